"""Writes a random tiny model and a data set of toy sentences, for tools that read folders.

python scripts/recipes/tiny_files.py FOLDER
"""

import json
import sys
from pathlib import Path

from common import causal_model, texts, tokenizer

folder = Path(sys.argv[1])
(folder / "data").mkdir(parents=True, exist_ok=True)
causal_model().save_pretrained(folder / "model")
tokenizer().save_pretrained(folder / "model")
(folder / "data" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(480)))
