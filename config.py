"""Every setting, its default, and what it means.

There are three ways to change a setting; a later one wins over an earlier one:

    config.model.n_layers = 6                                   at the end of this file
    python train.py --preset quick                              a named set of settings
    python train.py model.n_layers=6 data.dataset=mine.txt      on the command line
"""

import argparse
import contextlib
import copy
import difflib
import inspect
import operator
import os
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Literal


class UserError(argparse.ArgumentTypeError):
    """A user's mistake: `run_main` prints "error: " and its one sentence, and exits with code 2.

    argparse, which catches it in the value of an option, prepends the option's name.
    """


class UnknownName(UserError, AttributeError):
    """The name of a setting, a preset or an option that does not exist."""


def look_up(kind: str, name: str, known: dict):
    """Returns known[name]. Raises UnknownName, which suggests the nearest name that is known."""
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    advice = f"; did you mean {nearest[0]!r}?" if nearest else " (--help lists what there is)"
    raise UnknownName(f"there is no {kind} {name!r}{advice}")


class Section:
    """Settings as attributes. Reading or setting one that does not exist raises UnknownName."""
    __slots__ = ()

    def __getattr__(self, name: str):  # called for names that do not exist
        section = type(self).__name__.removesuffix("Config").lower()
        look_up("setting", f"{section}.{name}".strip("."), _TYPES | _SECTIONS)

    def __setattr__(self, name: str, value):
        if name not in self.__slots__:
            getattr(self, name)
        if not isinstance(value, _SECTIONS.get(name, object)):
            raise UserError(f"config.{name} = {value!r} is no section of settings; set its fields one by "
                            "one, as in config.model.n_layers = 6")
        if isinstance(value, str):
            value = value.replace(r"\n", "\n") if name == "separator" else os.path.expanduser(value)
        super().__setattr__(name, value)


@dataclass(slots=True)
class ModelConfig(Section):
    n_layers: int = 8                       # transformer blocks
    d_model: int = 256                      # width of the residual stream; a multiple of n_heads
    n_heads: int = 8                        # attention heads
    d_ff: int = 1024                        # width of the feed-forward (SwiGLU) layer
    max_seq_len: int = 512                  # context length in tokens
    dropout: float = 0.1                    # on the embedding and the two residual branches
    copy_heads: int = 0                     # heads of the last block, at most all, that begin by copying


@dataclass(slots=True)
class DataConfig(Section):
    dataset: str = "auto"                   # auto, tinystories, sample, a file, a folder, a Hub name
    max_stories: int | None = 10_000        # training stories; none: all of them
    max_val_stories: int | None = 1_000     # validation stories; none: all of them
    separator: str = "<|endoftext|>"        # between the stories of a text, at a line's end; \n: a new line
    data_dir: str = "data"                  # where the tokenized stories are kept


@dataclass(slots=True)
class TrainingConfig(Section):
    tokenizer_type: Literal["gpt2", "char", "bpe"] = "gpt2"
    bpe_vocab_size: int = 4096              # size of the bpe tokenizer's vocabulary
    batch_size: int = 32                    # sequences per step, a step being one update of the weights
    micro_batch_size: int | None = None     # sequences at a time, to save memory; none: all of them
    max_steps: int = 100_000                # the run ends earlier when validation stops improving
    max_minutes: float | None = None        # plan the run to end within this time; none: no limit
    optimizer: Literal["muon", "adamw"] = "muon"  # muon leaves embedding and norms to adamw
    learning_rate: float = 5e-3             # the peak; for adamw 1e-3 is fast and 3e-4 safe
    warmup_steps: int = 50                  # steps of linear warm-up
    decay_fraction: float = 0.6             # the last part of the run, where the rate falls to zero
    weight_decay: float | None = None       # none: 1.0, or less if an epoch has over 133 steps
    grad_clip: float = 1.0                  # the largest gradient norm
    eval_interval: int | None = None        # steps between evaluations; none: 100 to 250, or by time
    eval_batches: int | None = 20           # validation batches at each evaluation; none: all of them
    checkpoint_interval: int | None = None  # steps between checkpoints; none: a minute, or less
    early_stopping_evals: int | None = 5    # evaluations without a better loss that end it; none: never
    seed: int = 1337                        # for initialisation, data order and dropout
    use_amp: bool = True                    # mixed precision, if the device is fast at it
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile
    device: str = "auto"                    # auto, cpu, cuda, cuda:1, mps
    init_from: str | None = None            # a checkpoint, or its folder, whose weights a new run begins with
    checkpoint_dir: str = "checkpoints"
    log_dir: str = "logs"


@dataclass(slots=True)
class SamplingConfig(Section):
    temperature: float = 0.8                # how freely the next token is chosen; 0: always the likeliest
    top_k: int | None = 50                  # choose among this many tokens, the likeliest; none: all
    top_p: float | None = None              # among the likeliest, up to this much probability; none: all
    max_new_tokens: int = 400               # longest story, in tokens
    num_samples: int = 1                    # stories per opening
    seed: int | None = None                 # for the choices; none: a new one every time


PRESETS = {
    "quick": {  # learns to tell stories in five minutes on two CPU cores, from the bundled ones
        "data.dataset": "sample", "training.tokenizer_type": "bpe", "training.bpe_vocab_size": 1536,
        "model.n_layers": 4, "model.d_model": 128, "model.n_heads": 4, "model.d_ff": 384,
        "model.max_seq_len": 192, "model.dropout": 0.0, "model.copy_heads": 2,
        "training.batch_size": 6, "training.warmup_steps": 25, "training.max_minutes": 4.5,
        "training.eval_batches": 10,
        "sampling.temperature": 1.0, "sampling.top_k": None, "sampling.top_p": 0.6,  # friends' names vary
    },
    "laptop": {  # minutes, no GPU: many small steps of a small model
        "training.tokenizer_type": "bpe", "model.n_layers": 3, "model.d_model": 192, "model.n_heads": 3,
        "model.d_ff": 512, "model.max_seq_len": 384, "model.dropout": 0.0, "model.copy_heads": 3,
        "training.batch_size": 3, "training.warmup_steps": 20, "training.max_minutes": 10.0,
        "training.eval_batches": 16,
    },
    "small": {"model.n_layers": 6, "model.d_model": 192, "model.n_heads": 6, "model.d_ff": 768},
    "large": {"model.n_layers": 12, "model.d_model": 384, "model.n_heads": 12, "model.d_ff": 1536},
}


@dataclass(slots=True)
class Config(Section):
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @classmethod
    def of(cls, sections: dict) -> "Config":
        """Builds a config from {section: {field: value}}, as in a checkpoint; the rest has defaults."""
        return cls(**{name: _SECTIONS[name](**values) for name, values in sections.items()})

    def flat(self) -> dict:
        """Returns every setting as {"section.field": value}, in the order of this file."""
        return {name: operator.attrgetter(name)(self) for name in _TYPES}

    def set(self, name: str, value) -> None:
        """Sets "section.field"; text is converted to the field's type. Raises UserError."""
        value = _convert(str(value), look_up("setting", name, _TYPES))
        section, attribute = name.split(".")
        setattr(getattr(self, section), attribute, value)

    def apply_preset(self, name: str) -> None:
        """Applies a preset, whose checkpoints and logs get folders of their own. Raises UserError."""
        for setting, value in look_up("preset", name, PRESETS).items():
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


_SECTIONS = Config.__annotations__
_TYPES = {f"{section}.{name}": typing.get_args(kind) or (kind,)  # (int, NoneType), or the choices
          for section, cls in _SECTIONS.items() for name, kind in cls.__annotations__.items()}
_ANY = sys.maxsize  # no upper limit
_RANGES = {  # lowest, highest, and what else is allowed; others are at least 1, or above 0 if not whole
    "model.dropout": (0, 0.99), "model.copy_heads": (0, _ANY), "training.warmup_steps": (0, _ANY),
    "training.decay_fraction": (0, 1), "training.weight_decay": (0, 10),
    "training.bpe_vocab_size": (257, 65536), "training.seed": (0, _ANY), "sampling.seed": (0, _ANY),
    "sampling.temperature": (0.001, 1000, 0), "sampling.top_p": (1e-6, 1),
}


def parse_value(name: str, text: str):
    """Converts and checks the text of one setting, and returns its value. Raises UserError."""
    config = Config()
    config.set(name, text)
    config.validate()
    return config.flat()[name]


def _problem(name: str, value) -> str | None:
    """Returns what is wrong with a setting's value, or None."""
    types = _TYPES[name]
    if types[0] in (int, float):
        low, high, *others = _RANGES.get(name, (1 if int in types else 1e-12, _ANY))
        right = type(value) in (int, *types) and (value in (None, *others) or low <= value <= high)
        size = f"of at least {low:g}" if high == _ANY else f"between {low:g} and {high:g}"
        allowed = " or ".join([f"a {'whole ' * (int in types)}number {size}", *map(str, others)])
    elif types[0] in (bool, str):
        right = type(value) in types and value != ""
        allowed = {bool: "true or false", str: "text that is not empty"}[types[0]]
    else:
        right, allowed = value in types, f"one of {', '.join(types)}"
    return None if right else f"{name} = {value!r} must be {allowed}{' or none' * (NoneType in types)}"


def _convert(text: str, types: tuple):
    """Converts text to one of the types. If that fails, returns it as it is, for `validate` to report."""
    word = text.strip().lower()
    if word == "none" and NoneType in types:
        return None
    if bool in types:
        return {"true": True, "1": True, "false": False, "0": False}.get(word, text)
    with contextlib.suppress(ValueError, TypeError):  # TypeError for choices, which are text
        if int in types and "e" in word and float(word).is_integer():  # 1e5
            return int(float(word))
        return types[0](text)
    return text


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        if wrong := re.match(r"unrecognized arguments: (\S+)", message):
            look_up("option", wrong[1], self._option_string_actions | (_TYPES if self.epilog else {}))
        raise UserError(f"{message} (--help lists what there is)")

    def configure(self, config: Config, arguments: list[str] | None = None) -> tuple:
        """Returns `config` with the changes of the command line, validated, and the other options."""
        self.epilog = "settings and their defaults:\n"
        for section, cls in _SECTIONS.items():
            self.epilog += f"\n{section}.\n" + inspect.getsource(cls).partition(":\n")[2]
        self.add_argument("settings", nargs="*", metavar="section.field=value", help="listed below")
        self.add_argument("--preset", metavar="NAME", help="start from a preset: " + ", ".join(PRESETS))
        if "kernel" in Path(sys.argv[0]).name:  # in a notebook the arguments are the kernel's
            arguments = arguments or []
        options = self.parse_intermixed_args(arguments)
        config = copy.deepcopy(config)  # a notebook may run the script twice
        if options.preset:
            config.apply_preset(options.preset)
        for setting in options.settings:
            name, _, value = setting.partition("=")
            config.set(name, value)
        config.validate()
        return config, options


@contextlib.contextmanager
def signals_handled(handler: Callable, *names: str) -> Iterator[None]:
    """Handles the named signals with `handler` inside a `with` block, then puts the old handlers back. Leaves
    alone what is ignored (SIGHUP under nohup), is not handled by Python, or does not exist on this system.
    Does nothing outside the main thread.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ValueError):
            for number in filter(None, (getattr(signal, name, None) for name in names)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    stack.callback(signal.signal, number, signal.signal(number, handler))
        yield


def complain(mistake) -> int:
    """Prints a user's mistake and returns the exit code."""
    with contextlib.suppress(OSError):
        print(f"error: {mistake}", file=sys.stderr)
    return 2


def run_main(main: Callable) -> None:
    """Runs a script's main() and exits with the code it returns. A UserError, or an error of the operating
    system, is one line on standard error and exit code 2.

    Closed outputs are replaced by the null device, and characters that an output cannot encode by "?". A
    signal raises an exception, so that temporary files are deleted.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, mode))
        elif hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="replace")
    try:
        with signals_handled(lambda number, frame: sys.exit(128 + number), "SIGTERM", "SIGHUP"):
            code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 141
    except UserError as error:
        code = complain(error)
    except OSError as error:
        if not error.errno:
            raise
        code = complain(f"{error.filename or 'the system refuses'}: {error.strerror}")
    sys.exit(code)


def explain(kind, error, trace) -> None:
    """Prints an exception that nothing caught. One in the last lines of this file, which run on import,
    before `run_main`, is a user's mistake: one sentence and exit code 2.
    """
    for frame in traceback.extract_tb(trace):
        if (frame.filename, frame.name) == (__file__, "<module>"):
            sys.exit(complain(f"{__file__}, line {frame.lineno}: {error}"))
    sys.__excepthook__(kind, error, trace)


sys.excepthook = explain
config = Config()
# Your changes go here:
# config.model.n_layers = 6
