"""README's commands do what they say, in the order in which they stand there, with tiny settings added."""

import io
import re
import shlex
import sys

import pytest
from conftest import ROOT, exit_code, forked, write_stories

import data
import eval as evaluation
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = shlex.split("""
    model.n_layers=1 model.d_model=16 model.n_heads=2 model.d_ff=32 model.max_seq_len=64
    training.batch_size=4 data.dataset=my_stories.txt training.tokenizer_type=bpe training.bpe_vocab_size=300
    training.max_steps=2 training.device=cpu sampling.max_new_tokens=20""")
STORIES = [f"Tom saw a {color} {thing}. He put the {thing} in a {color} box."
           for color in ("red", "blue", "green") for thing in ("ball", "boat", "bird", "book", "bell")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_stories(tmp_path / "my_stories.txt", STORIES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: list[str]) -> int:
    """Runs `python SCRIPT ARGUMENTS` in a copy of this process; returns its exit code."""
    script, *arguments = words[1:]

    def work():
        sys.stdin = io.StringIO("Tom went\n")
        sys.argv = [script, *arguments, *(TINY if script == "train.py" else ())]
        return {"train.py": train, "data.py": data, "eval.py": evaluation}[script].main()

    return exit_code(forked(work))


def test_the_commands_of_the_readme_in_their_order(folder):
    blocks = "".join(re.findall(r"```bash\n(.*?)```", README, re.S))
    parts = (part for line in blocks.splitlines() for part in line.split(" && "))
    commands = [shlex.split(part, comments=True) for part in parts]
    commands = [words for words in commands if words[:1] == ["python"] and words[1].endswith(".py")]
    assert len(commands) >= 10
    for words in commands:
        assert run(words) == 0, words
    assert (folder / "my-model" / "config.json").exists() and (folder / "my-model.gguf").exists()
    assert (folder / "logs" / "training_curves.png").exists()
    snippet, = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(snippet, names)
    assert names["logits"].shape[2] == names["tokenizer"].vocab_size


def test_what_the_readme_says_to_add_to_train_py(folder):
    rows = re.findall(r"^\| [^|]* \| `((?:data|training)\.[^`]*|--[^`]*)`", README, re.M)
    assert len(rows) >= 5
    assert run(["python", "train.py"]) == 0  # which another run may begin from
    for row in rows:
        assert run(["python", "train.py", *shlex.split(row), "--fresh"]) == 0, row
    assert len(list(folder.glob("checkpoints/old-*"))) >= 3 and (folder / "tuned" / "best_model.pt").exists()
