"""Terminals, notebooks and environments as people have them: closed streams, narrow encodings, a kernel's
arguments, a cell run twice, half a torchrun, one folder spelt two ways.
"""

import io
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, before_step, command_line, go, metrics, opened, raises, tiny_config
from jupyter_client.manager import start_new_kernel

import eval as evaluation
import train
from config import ArgumentParser, Config, run_main

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("redirection", [">&- 2>&- <&-", "2>/dev/full"])
def test_closed_and_full_streams_do_not_end_a_run(tmp_path, redirection):
    config = tiny_config(tmp_path, training__max_steps=4)
    stories = tmp_path / "stories.txt"  # about which something is to say
    stories.write_text(stories.read_text().replace("<|endoftext|>", "</s>"))
    words = [sys.executable, str(ROOT / "train.py"), *command_line(config)]
    ended = subprocess.run(["sh", "-c", f'"$@" {redirection}', "sh", *words], cwd=tmp_path,
                           capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert [line["step"] for line in metrics(tmp_path)] == [4]


def test_a_listener_that_has_gone_does_not_end_a_run(tmp_path):
    config = tiny_config(tmp_path, training__max_steps=8)
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *command_line(config)], stderr=write,
                               stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    os.close(write)
    assert os.read(read, 10)
    os.close(read)
    assert process.wait(timeout=60) == 0 and len(metrics(tmp_path)) == 2


@pytest.mark.parametrize("script", ["train.py", "data.py"])
def test_characters_that_the_output_cannot_encode_are_replaced(tmp_path, script):
    config = tiny_config(tmp_path, training__max_steps=4)
    path = tmp_path / "stories.txt"
    path.write_text(path.read_text().replace("a", "\u65e5"), encoding="utf-8")
    config.data.dataset = str(path.rename(tmp_path / "\u65e5.txt"))
    narrow = os.environ | {"PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, ROOT / script, *command_line(config)], capture_output=True,
                           env=narrow, timeout=60)
    assert ended.returncode == 0 and b"?" in ended.stdout, ended.stderr


def test_a_file_that_the_system_refuses_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: open(tmp_path / "nowhere" / "s.txt"))
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/nowhere/s.txt: No such file or directory\n"
    with pytest.raises(OSError, match="a bug"):
        run_main(lambda: exec("raise OSError('a bug')"))


def test_a_notebook_has_other_arguments_and_other_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/lib/ipykernel_launcher.py", "-f", "/tmp/kernel-1.json"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as a kernel's: it has no reconfigure
    ArgumentParser("Trains.").configure(Config())
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: print("told"))
    assert ended.value.code is None and sys.stdout.getvalue() == "told\n"


def test_a_real_kernel_runs_the_scripts_again_and_again(tmp_path):
    """Cells as in Jupyter or Colab; a script that ends well says nothing of its end."""
    manager, kernel = start_new_kernel(cwd=str(tmp_path), env=os.environ | {"OMP_NUM_THREADS": "1"})

    def cell(code: str) -> str:
        shown = []
        kernel.execute_interactive(code, timeout=60, output_hook=lambda message: shown.append(str(
            {**message["content"], **message["content"].get("data", {})}.get("text", message["content"]))))
        return "".join(shown)

    try:
        train_it = f'%run "{ROOT}/train.py" ' + " ".join(command_line(tiny_config(tmp_path)))
        told = cell(train_it), cell(train_it)
        assert all("best validation loss" in text and "SystemExit" not in text for text in told), told
        assert "this run is complete at step 24" in told[1] and len(metrics(tmp_path)) == 6
        assert "Emma went" in cell(f'%run "{ROOT}/eval.py" --checkpoint checkpoints --generate "Emma went"')
        assert "error: there is no setting 'model.n_layer'" in cell(f'%run "{ROOT}/train.py" model.n_layer=3')
        cell(f"import sys; sys.path.insert(0, {str(ROOT)!r})")
        assert "same" in cell("from config import *; print('same' if config == Config() else config)")
        assert "torch.Size([1, 3, " in cell(
            "from eval import load_model; model, tokenizer, checkpoint = load_model('checkpoints')\n"
            "import torch; print(model(torch.tensor([tokenizer.encode('Tom')])).shape)")
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)


def elsewhere(config: Config) -> subprocess.CompletedProcess:
    """train.py with this config in a process of its own."""
    return subprocess.run([sys.executable, f"{ROOT}/train.py", *command_line(config)], capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=60)


def test_a_cell_may_run_again_in_the_same_process(tmp_path):
    config = tiny_config(tmp_path)
    with opened(config) as first, opened(config):
        assert train.train(first) == 0
        assert f"process {os.getpid()} is training" in elsewhere(config).stderr
    assert go(config).state.step == 24


def test_a_run_that_failed_in_a_notebook_holds_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "config", tiny_config(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with before_step(5, raises(RuntimeError("a bug"))), pytest.raises(RuntimeError) as kept:
        train.main()
    assert kept.tb  # which holds the run, as a notebook's last error does
    assert elsewhere(tiny_config(tmp_path)).returncode == 0


def test_handlers_of_signals_are_put_back(tmp_path):
    seen = []

    def work() -> int:
        seen.extend(map(signal.getsignal, (signal.SIGTERM, signal.SIGHUP)))
        return 0

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(SystemExit):
        run_main(work)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
    assert not {*seen} & {*before}


def test_a_full_output_is_one_sentence_and_a_mistake_nobody_reads_has_its_exit_code(tmp_path):
    (tmp_path / "s.txt").write_text("Tom ran.\n<|endoftext|>\nMia sat.")
    script = [sys.executable, f"{ROOT}/data.py", "data.dataset=s.txt", "training.tokenizer_type=char"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(script, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        assert subprocess.run([*script, "model.n_layer=3"], stderr=full, cwd=tmp_path).returncode == 2
    assert (done.returncode, done.stderr) == (2, "error: the system refuses: No space left on device\n")


def test_the_lock_file_is_never_written(tmp_path):
    """On Windows the first byte of a locked file cannot be."""
    with opened(tiny_config(tmp_path)):
        assert (tmp_path / "checkpoints" / ".lock").read_bytes() == b""
        assert (tmp_path / "checkpoints" / ".owner").read_text().split()[0] == str(os.getpid())


def test_one_folder_spelt_two_ways_is_one_folder(tmp_path):
    config = tiny_config(tmp_path)
    config.training.log_dir = f"{tmp_path}/logs/../checkpoints"
    assert go(config).code == 0 and (tmp_path / "checkpoints" / "metrics.jsonl").exists()


def test_a_link_to_itself_is_one_sentence(tmp_path):
    config = tiny_config(tmp_path)
    (tmp_path / "logs").symlink_to(tmp_path / "logs")
    ended = elsewhere(config)
    assert ended.returncode == 2 and f"error: cannot write {tmp_path}/logs: " in ended.stderr


def test_fresh_again_and_again_overwrites_nothing(tmp_path):
    config = tiny_config(tmp_path, training__max_steps=1)
    for _ in range(4):
        go(config, fresh=True)
    assert len(list((tmp_path / "checkpoints").glob("old-*/best_model.pt"))) == 3


def test_what_is_left_of_a_torchrun_changes_nothing(tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "a", "WORLD_SIZE": "2", "MASTER_PORT": "x"}.items():
        monkeypatch.setenv(name, value)
    assert go(tiny_config(tmp_path)).code == 0 and (tmp_path / "checkpoints" / "best_model.pt").exists()


def test_the_folder_of_a_checkpoint_is_its_best_model(tmp_path, monkeypatch, capsys):
    run = go(tiny_config(tmp_path))
    monkeypatch.setattr(sys, "argv", ["eval.py", "--checkpoint", str(tmp_path / "checkpoints"), "--plot"])
    evaluation.main()
    assert capsys.readouterr().out == f"{tmp_path}/logs/training_curves.png\n"
    model, _, checkpoint = evaluation.load_model(tmp_path / "checkpoints")
    assert checkpoint["step"] == train.load_checkpoint(run.best)["step"]
    for ours, theirs in zip(model.state_dict().values(), train.load_checkpoint(run.best)["model"].values()):
        assert torch.equal(ours, theirs)
