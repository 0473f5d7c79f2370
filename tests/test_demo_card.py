"""The demo's card is what its recorded lines say."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_card_is_made_from_the_lines():
    spec = importlib.util.spec_from_file_location("demo_card", ROOT / "scripts" / "demo_card.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    runs = [json.loads(line) for line in (ROOT / "model_cards" / "demo.jsonl").read_text().splitlines()]
    assert script.render(runs) == (ROOT / "model_cards" / "demo.md").read_text()
