"""Every setting, its default, and what it means.

Change a setting in one of three ways; later ones win:

    config.model.n_layers = 6                                   at the end of this file
    python train.py --preset quick                              a named set of settings
    python train.py model.n_layers=6 data.dataset=mine.txt      on the command line
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import inspect
import math
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType


class UserError(argparse.ArgumentTypeError):
    """A user's mistake: `run_main` prints `error: ` and this one sentence, and exits with code 2.

    Where it concerns the value of a command-line option, argparse puts the option's name before it.
    """


@dataclass(slots=True)
class ModelConfig:
    n_layers: int = 8                       # transformer blocks
    d_model: int = 256                      # width of the residual stream; a multiple of n_heads
    n_heads: int = 8                        # attention heads
    d_ff: int = 1024                        # width of the feed-forward (SwiGLU) layer
    max_seq_len: int = 512                  # context length in tokens
    dropout: float = 0.1                    # on the embedding and the two residual branches
    copy_heads: int = 0                     # heads of the last block that copy from the context at first


@dataclass(slots=True)
class DataConfig:
    dataset: str = "auto"                   # auto, tinystories, sample, a file, a folder, a Hub name
    max_stories: int | None = 10_000        # training stories; none: all of them
    max_val_stories: int | None = 1_000     # validation stories; none: all of them
    data_dir: str = "data"                  # where the tokenized stories are kept


@dataclass(slots=True)
class TrainingConfig:
    tokenizer_type: str = "gpt2"            # gpt2, char, bpe
    bpe_vocab_size: int = 4096              # size of the bpe tokenizer's vocabulary
    batch_size: int = 32                    # sequences per step, a step being one update of the weights
    micro_batch_size: int | None = None     # sequences at a time, bounds memory; none: all of them
    max_steps: int = 100_000                # the run ends earlier when validation stops improving
    max_minutes: float | None = None        # a budget of time, within which the run ends, its rate at zero
    optimizer: str = "muon"                 # muon (with adamw for embedding and norms), adamw
    learning_rate: float = 5e-3             # the peak; for adamw 1e-3 is fast and 3e-4 safe
    warmup_steps: int = 50                  # steps of linear warm-up
    decay_fraction: float = 0.6             # last part of the run, in which the rate falls to zero
    weight_decay: float = 1.0               # strong, since 10,000 stories are read many times
    grad_clip: float = 1.0                  # largest gradient norm
    eval_interval: int | None = None        # steps between evaluations; none: an epoch, but 100 to 250
    eval_batches: int | None = 20           # validation batches at each evaluation; none: all of them
    checkpoint_interval: int | None = None  # steps between checkpoints; none: about a minute
    early_stopping_evals: int | None = 5    # evaluations without a better loss that end it; none: never
    seed: int = 1337                        # of initialisation, data order and dropout
    use_amp: bool = True                    # mixed precision where the device is fast at it
    compile: str = "auto"                   # torch.compile: auto, on, off
    device: str = "auto"                    # auto, cpu, cuda, cuda:1, mps
    init_from: str | None = None            # a checkpoint, or its folder, whose weights a new run begins with
    checkpoint_dir: str = "checkpoints"
    log_dir: str = "logs"


@dataclass(slots=True)
class SamplingConfig:
    temperature: float = 0.8                # how freely the next token is chosen; 0: always the likeliest
    top_k: int | None = 50                  # among this many of the likeliest tokens; none: all
    top_p: float | None = None              # among the likeliest tokens with this much probability; none: all
    max_new_tokens: int = 400               # longest story, in tokens
    num_samples: int = 1                    # stories per opening
    seed: int | None = None                 # of the choices; none: another one every time


PRESETS = {
    "quick": {  # a story-teller in less than five minutes on two CPU cores, from the bundled stories
        "data.dataset": "sample", "training.tokenizer_type": "bpe", "training.bpe_vocab_size": 2048,
        "model.n_layers": 4, "model.d_model": 256, "model.n_heads": 4, "model.d_ff": 768,
        "model.max_seq_len": 256, "model.dropout": 0.2, "training.batch_size": 16,
        "training.warmup_steps": 25, "training.max_minutes": 4.5, "sampling.top_k": 5,
    },
    "laptop": {  # without a GPU, for a few minutes, less than an epoch or two: half as deep
        "training.tokenizer_type": "bpe", "model.n_layers": 4, "model.dropout": 0.0, "training.batch_size": 4,
        "training.warmup_steps": 20, "training.max_minutes": 10.0,
        "training.eval_interval": 100, "training.eval_batches": 8,
    },
    "small": {"model.n_layers": 6, "model.d_model": 192, "model.n_heads": 6, "model.d_ff": 768},
    "large": {"model.n_layers": 12, "model.d_model": 384, "model.n_heads": 12, "model.d_ff": 1536},
}

_SECTIONS = {"model": ModelConfig, "data": DataConfig, "training": TrainingConfig, "sampling": SamplingConfig}
_TYPES = {f"{section}.{f.name}": typing.get_args(f.type) or (f.type,)  # (int, NoneType) where none is allowed
          for section, cls in _SECTIONS.items() for f in dataclasses.fields(cls)}
_CHOICES = {
    "training.tokenizer_type": ("gpt2", "char", "bpe"),
    "training.optimizer": ("muon", "adamw"),
    "training.compile": ("auto", "on", "off"),
}
_RANGES = {  # field: (lowest, highest, and what is allowed besides); numbers not listed are at least 1
    "model.dropout": (0, 0.99), "model.copy_heads": (0, math.inf), "training.learning_rate": (1e-12, 10),
    "training.grad_clip": (1e-12, math.inf), "training.warmup_steps": (0, math.inf),
    "training.decay_fraction": (0, 1), "training.weight_decay": (0, 10),
    "training.max_minutes": (1e-3, math.inf), "training.bpe_vocab_size": (257, 65536),
    "training.seed": (0, 2**63 - 1), "sampling.seed": (0, 2**63 - 1),
    "sampling.temperature": (0.001, 1000, 0), "sampling.top_p": (1e-6, 1),
    "sampling.max_new_tokens": (1, 10**6), "sampling.num_samples": (1, 10**4),
}


@dataclass(slots=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @classmethod
    def of(cls, sections: dict) -> "Config":
        """Returns the config of {section: {field: value}}, as in a checkpoint; others have defaults."""
        return cls(**{name: _SECTIONS[name](**values) for name, values in sections.items()})

    def flat(self) -> dict:
        """Returns every setting as {"section.field": value}, in the order of this file."""
        return {f"{section}.{name}": value
                for section, values in dataclasses.asdict(self).items() for name, value in values.items()}

    def set(self, name: str, value) -> None:
        """Sets "section.field"; text is converted to the field's type. Raises UserError."""
        if name not in _TYPES:
            raise UserError(f"there is no setting {name!r}{_suggest(name, _TYPES)}")
        section, attribute = name.split(".")
        value = _convert(value, _TYPES[name]) if isinstance(value, str) else value
        setattr(getattr(self, section), attribute, value)

    def apply_preset(self, name: str) -> None:
        """Applies a preset, which keeps its run in folders of its own. Raises UserError."""
        if name not in PRESETS:
            known = ", ".join(PRESETS)
            raise UserError(f"there is no preset {name!r}{_suggest(name, PRESETS)}; presets are {known}")
        for setting, value in PRESETS[name].items():
            self.set(setting, value)
        self.training.checkpoint_dir += f"/{name}"
        self.training.log_dir += f"/{name}"

    def validate(self) -> None:
        """Raises one UserError that names every setting that is wrong, its value, and what is allowed."""
        wrong = {name: text for name, value in self.flat().items() if (text := _problem(name, value))}
        model, device = self.model, self.training.device
        if not {"model.d_model", "model.n_heads"} & wrong.keys() and model.d_model % (2 * model.n_heads):
            wrong["model"] = (f"model.d_model = {model.d_model} must be a multiple of 2 x model.n_heads = "
                              f"{2 * model.n_heads}, since rotary positions need heads of an even size")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(device)):
            wrong["training.device"] = f"training.device = {device!r} must be auto, cpu, cuda, cuda:N or mps"
        if wrong:
            raise UserError("; ".join(wrong.values()))


def parse_value(name: str, text: str):
    """Returns the value of the setting `name` written as `text`. Raises UserError where it is not allowed."""
    config = Config()
    config.set(name, text)
    config.validate()
    return config.flat()[name]


def _problem(name: str, value) -> str | None:
    """Returns what is wrong with a setting's value, or None."""
    types = _TYPES[name]
    low, high, *besides = _RANGES.get(name, (1, math.inf))
    is_number = float in types and isinstance(value, int)
    if isinstance(value, bool) and bool not in types or not (isinstance(value, types) or is_number):
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[types[0]]
        return f"{name} = {value!r} must be {kind}{' or none' if NoneType in types else ''}"
    if types[0] in (int, float) and value is not None and value not in besides:
        if not low <= value <= high or value == math.inf:
            allowed = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            return f"{name} = {value!r} must be {' or '.join([allowed, *map(str, besides)])}"
    if value not in _CHOICES.get(name, (value,)):
        return f"{name} = {value!r} must be one of {', '.join(_CHOICES[name])}"
    return f"{name} must not be empty" if value == "" else None


def _suggest(name: str, known) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _convert(text: str, types: tuple):
    """Returns text as a value of one of the types, or as it is where that fails, for `validate` to report."""
    text = os.path.expanduser(text)  # which a shell does not do after an equals sign
    word = text.strip().lower()
    if word == "none" and NoneType in types:
        return None
    if bool in types:
        return {"true": True, "1": True, "yes": True, "on": True,
                "false": False, "0": False, "no": False, "off": False}.get(word, text)
    try:
        if int in types and "e" in word and float(word).is_integer():  # 1e5
            return int(float(word))
        return types[0](text)
    except ValueError:
        return text


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors; with `settings`, it reads --preset and section.field=value."""

    def __init__(self, description: str, settings: bool = True):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        if settings:
            self.epilog = "settings and their defaults:\n" + "".join(
                f"\n{section}.\n" + "\n".join(inspect.getsource(cls).splitlines()[2:]) + "\n"
                for section, cls in _SECTIONS.items())
            self.add_argument("settings", nargs="*", metavar="section.field=value", help="listed below")
            self.add_argument("--preset", metavar="NAME", help="start from a preset: " + ", ".join(PRESETS))

    def error(self, message: str):
        wrong = re.match(r"unrecognized arguments: --([\w-]+)", message)
        known = [option.strip("-") for option in self._option_string_actions]
        known += _TYPES if self.epilog else ()
        raise UserError(f"{message}{_suggest(wrong[1], known) if wrong else ''} (--help lists what there is)")

    def configure(self, config: Config,
                  arguments: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
        """Returns `config` as the command line changes it, validated, and the other options."""
        config = copy.deepcopy(config)  # a notebook may run the script again
        if "kernel" in Path(sys.argv[0]).name:  # a notebook's, whose arguments are not ours
            arguments = arguments or []
        options = self.parse_intermixed_args(arguments)
        if options.preset:
            config.apply_preset(options.preset)
        for setting in options.settings:
            name, equals, value = setting.partition("=")
            if not equals:
                raise UserError(f"{setting!r} is no setting; write section.field=value, as model.n_layers=6")
            config.set(name, value)
        config.validate()
        return config, options


@contextlib.contextmanager
def signals_handled(handler: Callable, *names: str) -> Iterator[None]:
    """Lets `handler` have the signals that this system has of those named, until it is left. Those that are
    ignored, as SIGHUP under nohup, or not Python's remain so; off the main thread there are none.
    """
    before = {}
    with contextlib.suppress(ValueError):
        for number in filter(None, (getattr(signal, name, None) for name in names)):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def run_main(main: Callable) -> None:
    """Runs a script's main(); a UserError, or what the system refuses, becomes one line on standard error and
    exit code 2.

    A closed output is no error, a character that an output cannot encode is replaced, and a signal that ends
    it does so by an exception, which leaves no half-written file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, mode))
        elif hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")
    code, mistake = 2, None
    try:
        with signals_handled(lambda number, frame: sys.exit(128 + number), "SIGTERM", "SIGHUP"):
            code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 141
    except UserError as error:
        mistake = error
    except OSError as error:
        if not error.errno:
            raise
        mistake = f"{error.filename or 'the system refuses'}: {error.strerror}"
    if mistake:
        with contextlib.suppress(OSError):
            print(f"error: {mistake}", file=sys.stderr)
    sys.exit(code)


config = Config()
# Your changes go here:
# config.model.n_layers = 6
