"""Settings: three ways to set them, types, validation, presets."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest
from conftest import ROOT

from config import PRESETS, ArgumentParser, Config, UserError, parse_value


def configure(*arguments: str) -> Config:
    config, _ = ArgumentParser("test").configure(Config(), list(arguments))
    return config


def test_defaults_are_those_of_the_design():
    config = Config()
    model, stories, training, sampling = config.model, config.data, config.training, config.sampling
    assert (model.n_layers, model.d_model, model.n_heads, model.d_ff) == (8, 256, 8, 1024)
    assert (model.max_seq_len, model.dropout) == (512, 0.1)
    assert (stories.dataset, stories.max_stories, stories.max_val_stories) == ("auto", 10_000, 1_000)
    assert (training.batch_size, training.max_steps, training.use_amp) == (32, 100_000, True)
    assert (training.tokenizer_type, training.bpe_vocab_size) == ("gpt2", 4096)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.num_samples) == (0.8, 50, None, 1)
    config.validate()


def test_every_kind_of_value():
    config = configure(
        "training.learning_rate=1e-3", "training.max_steps=1e5", "data.max_stories=none", "model.n_layers=3",
        "training.use_amp=false", "training.max_minutes=5", "data.dataset=my stories=old.txt",
        "sampling.top_k=none", "sampling.temperature=0")
    assert config.training.learning_rate == 1e-3 and config.training.max_steps == 100_000
    assert config.data.max_stories is None and config.model.n_layers == 3 and config.training.use_amp is False
    assert config.training.max_minutes == 5.0 and config.data.dataset == "my stories=old.txt"
    assert config.sampling.top_k is None and config.sampling.temperature == 0


def test_a_home_folder_is_one_after_an_equals_sign_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = configure("data.dataset=~/stories.txt", "training.log_dir=~", "data.data_dir=a~b")
    assert (config.data.dataset, config.training.log_dir) == ("/home/me/stories.txt", "/home/me")
    assert config.data.data_dir == "a~b"
    config.data.dataset = "~/more.txt"  # at the end of config.py
    assert config.data.dataset == "/home/me/more.txt"


def test_a_config_of_its_own_values_is_the_same_and_sections_of_an_older_one_have_defaults():
    config = configure("model.n_layers=3", "sampling.seed=5")
    assert Config.of(dataclasses.asdict(config)) == config
    older = Config.of({"model": dataclasses.asdict(config.model)})
    assert older.model == config.model and older.sampling == Config().sampling


def test_a_single_value_is_parsed_and_checked():
    assert parse_value("sampling.temperature", "0.5") == 0.5 and parse_value("sampling.top_k", "none") is None
    for name, text in (("sampling.temperature", "-1"), ("sampling.top_k", "2.5"), ("sampling.tempo", "1")):
        with pytest.raises(UserError, match=name):
            parse_value(name, text)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_keep_their_own_folders(name):
    config = configure("--preset", name)
    assert config.training.checkpoint_dir == f"checkpoints/{name}"
    assert config.training.log_dir == f"logs/{name}"


def test_the_command_line_wins_over_the_preset_in_any_order():
    for arguments in (["--preset", "small", "model.n_layers=5"], ["model.n_layers=5", "--preset", "small"]):
        assert configure(*arguments).model.n_layers == 5
        assert configure(*arguments).model.d_model == PRESETS["small"]["model.d_model"]


@pytest.mark.parametrize(("arguments", "names"), [
    (["model.n_layer=3"], ["model.n_layer", "did you mean 'model.n_layers'"]),
    (["n_layers=3"], ["n_layers", "model.n_layers"]),
    (["--batch_size=12"], ["--batch_size=12", "did you mean 'training.batch_size'?"]),
    (["--presets", "quick"], ["--presets", "did you mean '--preset'?"]),
    (["optimizer.lr=3"], ["optimizer.lr"]),
    (["--preset", "quik"], ["quik", "did you mean 'quick'"]),
    (["--preset"], ["--preset"]),
    (["--no-such-option"], ["--no-such-option"]),
    (["model.n_layers"], ["model.n_layers = '' must be a whole number"]),
    (["model.n_layers=three"], ["model.n_layers", "three", "whole number"]),
    (["model.n_layers=2.5"], ["model.n_layers", "2.5", "whole number"]),
    (["model.n_layers=none"], ["model.n_layers", "none"]),
    (["model.n_layers=true"], ["model.n_layers", "whole number"]),
    (["model.n_layers=0"], ["model.n_layers", "0", "at least 1"]),
    (["model.n_layers=-1"], ["model.n_layers", "-1"]),
    (["model.n_heads=7"], ["model.d_model", "model.n_heads"]),
    (["model.d_model=8", "model.n_heads=8"], ["even"]),
    (["model.dropout=1"], ["model.dropout", "0.99"]),
    (["model.dropout=-0.1"], ["model.dropout"]),
    (["model.max_seq_len=0"], ["model.max_seq_len"]),
    (["training.learning_rate=fast"], ["training.learning_rate", "fast", "number"]),
    (["training.learning_rate=nan"], ["training.learning_rate", "nan"]),
    (["training.learning_rate=0"], ["training.learning_rate", "0"]),
    (["training.use_amp=maybe"], ["training.use_amp", "maybe", "true or false"]),
    (["training.tokenizer_type=gpt3"], ["training.tokenizer_type", "gpt3", "gpt2, char, bpe"]),
    (["training.bpe_vocab_size=100000"], ["training.bpe_vocab_size", "65536"]),
    (["training.bpe_vocab_size=256"], ["training.bpe_vocab_size", "257"]),
    (["training.optimizer=sgd"], ["training.optimizer", "muon, adamw"]),
    (["training.compile=maybe"], ["training.compile", "auto, on, off"]),
    (["training.device=gpu"], ["training.device", "gpu", "cuda"]),
    (["training.batch_size=0", "training.max_steps=0"], ["training.batch_size", "training.max_steps"]),
    (["training.batch_size=big", "training.use_amp=maybe"],
     ["'big' must be a whole number of at least 1;", "'maybe' must be true or false"]),
    (["data.max_stories=all"], ["data.max_stories", "'all' must be a whole number of at least 1 or none"]),
    (["training.seed=-1"], ["training.seed"]),
    (["training.max_minutes=0"], ["training.max_minutes"]),
    (["training.checkpoint_dir="], ["training.checkpoint_dir", "empty"]),
    (["data.max_stories=0"], ["data.max_stories"]),
    (["sampling.temperature=-1"], ["sampling.temperature", "-1", "between 0.001 and 1000 or 0"]),
    (["sampling.top_p=1.1"], ["sampling.top_p", "1.1"]),
    (["sampling.temprature=1"], ["sampling.temprature", "did you mean 'sampling.temperature'"]),
])
def test_a_mistake_is_one_sentence_that_names_it(arguments, names):
    with pytest.raises(UserError) as error:
        configure(*arguments)
    assert all(name in str(error.value) for name in names) and "\n" not in str(error.value)


def test_a_script_without_settings_suggests_none():
    with pytest.raises(UserError) as error:
        ArgumentParser("Evaluates.").parse_args(["--max_steps=3"])
    assert "--max_steps" in str(error.value) and "training" not in str(error.value)


def test_a_wrong_type_in_config_py_is_reported_with_all_other_problems():
    config = Config()
    config.training.batch_size, config.model.n_layers, config.training.use_amp = "32", 2.0, 1
    with pytest.raises(UserError) as error:
        config.validate()
    assert all(name in str(error.value) for name in ("batch_size = '32'", "n_layers = 2.0", "use_amp = 1"))


@pytest.mark.parametrize(("line", "sentence"), [
    ("config.model.n_layer = 6", "there is no setting 'model.n_layer'; did you mean 'model.n_layers'?"),
    ("config.model.nlayers += 1", "there is no setting 'model.nlayers'; did you mean 'model.n_layers'?"),
    ("config.training.tokenizer = 'bpe'",
     "there is no setting 'training.tokenizer'; did you mean 'training.tokenizer_type'?"),
    ("config.modle.n_layers = 6", "there is no setting 'modle'; did you mean 'model'?"),
    ("config.n_layers = 6", "there is no setting 'n_layers'; did you mean 'model.n_layers'?"),
    ("config.model = dict(n_layers=6)", "config.model = {'n_layers': 6} is no section of settings; set its "
                                        "fields one by one, as in config.model.n_layers = 6"),
    ("config.data = None", "config.data = None is no section of settings; set its fields one by one, as in "
                           "config.model.n_layers = 6"),
    ("config.apply_preset('quik')", "there is no preset 'quik'; did you mean 'quick'?"),
])
def test_a_misspelt_name_is_one_sentence_that_suggests_another(line, sentence):
    with pytest.raises(UserError) as error:
        exec(line, {"config": Config()})
    assert str(error.value) == sentence


@pytest.mark.parametrize(("line", "sentence"), [
    ("config.modle.n_layers = 6", "there is no setting 'modle'; did you mean 'model'?"),
    ("config.model = ModelConfig(n_layer=6)",
     "ModelConfig.__init__() got an unexpected keyword argument 'n_layer'"),
])
def test_a_mistake_at_the_end_of_config_py_is_one_sentence_and_code_2(tmp_path, line, sentence):
    """In a script that has only begun to import it."""
    code = (ROOT / "config.py").read_text() + line
    (tmp_path / "config.py").write_text(code)
    (tmp_path / "script.py").write_text("from config import run_main\nrun_main(print)")
    ended = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == f"error: {tmp_path}/config.py, line {len(code.splitlines())}: {sentence}\n"


def test_other_exceptions_are_reported_as_ever(tmp_path):
    (tmp_path / "script.py").write_text("import config\nconfig.Config().model.n_layer")
    ended = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True,
                           env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert ended.returncode == 1 and "Traceback" in ended.stderr and "did you mean 'model" in ended.stderr


def test_a_config_can_be_copied_and_asked_what_it_has():
    config = configure("model.n_layers=3")
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert hasattr(config.model, "n_layers") and not hasattr(config.model, "n_layer")


def test_a_newline_in_a_separator_is_written_as_in_python():
    config = configure(r"data.separator=\n\n\n")
    assert config.data.separator == "\n\n\n"
    config.data.separator = "~\n"
    assert config.data.separator == "~\n"  # no home folder


def test_importing_has_no_side_effects(tmp_path):
    code = ("import config, data, model, train, eval, sys\n"
            "assert not {'datasets', 'matplotlib', 'transformers'} & sys.modules.keys()")
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert not list(tmp_path.iterdir())


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as exit_code:
        ArgumentParser("Trains.").configure(Config(), ["--help"])
    assert exit_code.value.code == 0
    text = capsys.readouterr().out
    assert all(name.split(".")[1] in text for name in Config().flat()) and "--preset" in text
