"""Claims about the demo: its data are what it says, its options arrive, it learns, and it resumes to the bit."""

import importlib
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("peft")
pytest.importorskip("evaluate")

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
OPTIMIZERS = ["adamw_torch", "automagic_8bit"]
WORDS = ["good", "bad", "film", "plot", "slow", "fine", "very", "dull"]
# PEFT asks transformers for an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    """Imports the script as Python does when it runs it: with its folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("finetune_lora")


@pytest.fixture(scope="module")
def sentences(demo: ModuleType) -> ModuleType:
    """Imports the script's data module."""
    return importlib.import_module("sentences")


def write_archive(folder: Path, lines: list[str]) -> Path:
    """Writes a source distribution laid out like vaderSentiment 0.5's, with `lines` as its movie sentences."""
    content = "\r\n".join(lines).encode()
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name, data in {
            "tweets_GroundTruth.txt": b"1\t2.0\ttweet",
            "movieReviewSnippets_GroundTruth.txt": content,
        }.items():
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    archive = folder / "vaderSentiment-0.5.zip"
    with zipfile.ZipFile(archive, "w") as outer:
        outer.writestr("vaderSentiment-0.5/README.txt", "read me")
        outer.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return archive


def rows_of(texts: list[str]) -> "datasets.Dataset":
    """Gives sentences whose class is the parity of their length."""
    return datasets.Dataset.from_dict({"text": texts, "label": [len(text) % 2 for text in texts]})


def test_reader_keeps_the_clear_sentences_of_the_movie_file(sentences: ModuleType, tmp_path: Path) -> None:
    lines = [
        "1\t2.25\tA café scene.",
        "2\t-0.6\tToo tepid",
        "3\t0.4\tIt ends",
        "4\t-0.49\tIt begins",
        "5\t0.5\tJust fine",
    ]
    rows = sentences.read_movie_sentences(write_archive(tmp_path, lines))
    assert rows["text"][:] == ["A café scene.", "Too tepid", "Just fine"]
    assert rows.features["label"].int2str(rows["label"][:]) == ["positive", "negative", "positive"]


def test_an_archive_in_the_cache_is_not_downloaded_again(
    sentences: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    archive = write_archive(tmp_path, ["1\t1.0\tgood"])
    assert sentences.fetch_movie_archive(tmp_path) == archive


def test_a_failed_download_says_what_to_put_where(
    sentences: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match=r"put vaderSentiment-0.5.zip into .* by hand"):
        sentences.fetch_movie_archive(tmp_path)


def test_split_is_the_published_one(sentences: ModuleType) -> None:
    texts = [f"sentence number {number}" for number in range(40)]
    held_out = sentences.split_by_hash(rows_of(texts), 10)["test"]
    assert sentences.fingerprint(held_out) == "d969781227cc3ed54f0716d0394f5953a241891ae585d6a3c98763d9ac5d7c6b"


def test_split_depends_on_the_sentences_alone(sentences: ModuleType) -> None:
    texts = [f"sentence number {number}" for number in range(40)]
    split, reordered = (sentences.split_by_hash(rows_of(rows), 10) for rows in (texts, texts[::-1]))
    for part in ("train", "test"):
        assert sentences.fingerprint(split[part]) == sentences.fingerprint(reordered[part])


def test_a_repeated_sentence_is_on_one_side_only(sentences: ModuleType) -> None:
    texts = [f"sentence number {number}" for number in range(40)]
    split = sentences.split_by_hash(rows_of(texts + texts), 10)
    assert sorted(split["train"]["text"][:] + split["test"]["text"][:]) == sorted(texts)


@pytest.mark.parametrize("held_out", [0, 40])
def test_a_split_without_a_side_is_refused(sentences: ModuleType, held_out: int) -> None:
    with pytest.raises(ValueError, match=f"--eval_samples must be from 1 to 39.*got {held_out}"):
        sentences.split_by_hash(rows_of([f"sentence number {number}" for number in range(40)]), held_out)


def test_changed_movie_sentences_are_refused(sentences: ModuleType, tmp_path: Path) -> None:
    write_archive(tmp_path, [f"{number}\t1.0\tsentence number {number}" for number in range(1600)])
    with pytest.raises(ValueError, match="the held-out movie sentences changed"):
        sentences.load_movie_sentences(tmp_path)


def test_a_missing_column_is_answered_with_those_there(sentences: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("review,stars\ngood,5\nbad,1\n")
    with pytest.raises(ValueError, match=r"no column 'text': name one of \['review', 'stars'\]"):
        sentences.load_sentences(str(tmp_path / "rows.csv"), "text", "stars", 1)


def test_local_files_bring_their_own_columns_and_classes(sentences: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"review": w, "mood": w[0]}) + "\n" for w in WORDS))
    data = sentences.load_sentences(str(tmp_path / "rows.jsonl"), "review", "mood", 2)
    assert data["train"].column_names == ["text", "label"]
    assert data["train"].features["label"].names == sorted({word[0] for word in WORDS})


LENGTHS = [7 * number % 61 + 3 for number in range(1000)]


def test_batches_hold_sentences_of_like_length(sentences: ModuleType) -> None:
    order = sentences.order_by_length(LENGTHS, 10, 100, seed=1)
    spread = [
        max(batch) - min(batch) for batch in ([LENGTHS[i] for i in order[k : k + 10]] for k in range(0, 1000, 10))
    ]
    assert sum(spread) / len(spread) < 3  # 51 in random batches


def test_an_epoch_holds_every_sentence_once(sentences: ModuleType) -> None:
    order = sentences.order_by_length(LENGTHS, 10, 200, seed=1)
    assert sorted(order[:1000]) == sorted(order[1000:]) == list(range(1000))
    assert order[:1000] != order[1000:]


def test_the_order_is_a_matter_of_the_seed_and_not_of_the_number_of_steps(sentences: ModuleType) -> None:
    long, short = (sentences.order_by_length(LENGTHS, 10, batches, seed=1) for batches in (150, 50))
    assert long[:500] == short
    assert sentences.order_by_length(LENGTHS, 10, 50, seed=2) != short


def test_a_batch_larger_than_the_data_is_refused(sentences: ModuleType) -> None:
    with pytest.raises(ValueError, match="--batch_size must be at most 3, the training sentences, got 4"):
        sentences.order_by_length([1, 2, 3], 4, 1, seed=1)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_options_reach_the_training_arguments(demo: ModuleType, tmp_path: Path, optim: str) -> None:
    line = f"--optim {optim} --learning_rate 2e-3 --max_steps 61 --batch_size 8 --seed 7 --output_dir {tmp_path}"
    args = demo.training_arguments(demo.parse_options([*line.split(), "--save_steps", "30", "--logging_steps", "5"]))
    assert (args.optim, args.learning_rate, args.max_steps, args.seed) == (optim, 2e-3, 61, 7)
    assert (args.per_device_train_batch_size, args.save_steps, args.logging_steps) == (8, 30, 5)
    assert (args.get_warmup_steps(61), args.lr_scheduler_type, args.max_grad_norm) == (4, "cosine", 1.0)
    assert args.output_dir == str(tmp_path)


def test_without_options_only_the_optimizer_is_named(demo: ModuleType) -> None:
    options = demo.parse_options([])
    assert options.optim == "automagic_8bit"
    assert options.learning_rate == transformers.TrainingArguments(output_dir="unused").learning_rate


def test_baseline_is_the_same_run_with_adamw(demo: ModuleType, tmp_path: Path) -> None:
    line = [
        "--seed",
        "3",
        "--max_steps",
        "5",
        "--optim_args",
        "max_lr=1e-2",
        "--resume_from_checkpoint",
        "checkpoint-2",
    ]
    options = demo.baseline(demo.parse_options([*line, "--output_dir", str(tmp_path)]))
    assert (options.seed, options.max_steps) == (3, 5)
    assert (options.optim, options.learning_rate, options.optim_args) == ("adamw_torch", 1e-3, None)
    assert (options.output_dir, options.resume_from_checkpoint) == (tmp_path / "baseline", None)


def test_metric_is_the_share_of_right_classes(demo: ModuleType) -> None:
    logits = torch.eye(3)[[0, 1, 2, 2]].numpy()
    outcome = transformers.EvalPrediction(predictions=logits, label_ids=torch.tensor([0, 1, 2, 1]).numpy())
    assert demo.accuracy()(outcome) == {"accuracy": 0.75}


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds a random two-layer BERT and a word tokenizer on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny_bert")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def line(tiny_bert: Path, tmp_path: Path) -> list[str]:
    """Gives the options of a short run on sentences whose class is their first word."""
    draw = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (240, 6), generator=draw).tolist()
    rows = {" ".join(WORDS[pick] for pick in row): int(row[0] < 4) for row in picks}
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows.items()))
    options = f"--model {tiny_bert} --dataset {tmp_path}/rows.csv --eval_samples 40 --batch_size 8"
    return options.split()


def test_adapters_are_on_every_linear_layer_but_the_pooler_and_the_head_is_trained(
    demo: ModuleType, tiny_bert: Path
) -> None:
    options = demo.parse_options(["--model", str(tiny_bert), "--rank", "4", "--alpha", "12"])
    _, model = demo.build_model(options, datasets.ClassLabel(num_classes=3))
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 2 * 6
    assert not any("pooler" in name for name in trained)
    assert len(trained) == 2 * len(adapted) + 2
    assert sum("classifier.modules_to_save" in name for name in trained) == 2
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    layer = model.get_submodule(next(iter(adapted)))
    assert (layer.r["default"], layer.scaling["default"]) == (4, 3.0)


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_demo_trains_shows_the_rates_and_writes_the_adapter(
    demo: ModuleType, line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], optim: str
) -> None:
    out = tmp_path / "out"
    rate = ["--learning_rate", "1e-2"] if optim == "adamw_torch" else []
    steps = ["--optim", optim, *rate, "--max_steps", "60", "--logging_steps", "10", "--output_dir", str(out)]
    (result,) = demo.main([*line, *steps])
    rates = [entry for entry in result.log if "learning_rate" in entry]
    assert len(rates) == 6
    assert all(entry[demo.TRUE_RATE] > 0 for entry in rates[:-1])
    assert result.after["eval_loss"] < result.before["eval_loss"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in out.iterdir()}
    shown = capsys.readouterr().out
    for cell in (optim, f"{result.before['eval_accuracy']:.4f}", f"{result.after['eval_loss']:.4f}", str(out)):
        assert cell in shown


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_resumed_run_ends_with_the_same_bits(demo: ModuleType, line: list[str], tmp_path: Path, optim: str) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    steps = ["--optim", optim, "--learning_rate", "1e-3", "--max_steps", "40", "--save_steps", "18"]
    demo.main([*line, *steps, "--output_dir", str(whole)])
    checkpoint = ["--resume_from_checkpoint", str(whole / "checkpoint-18")]
    demo.main([*line, *steps, *checkpoint, "--output_dir", str(resumed)])
    final, again = (safetensors.load_file(path / "adapter_model.safetensors") for path in (whole, resumed))
    assert final.keys() == again.keys()
    assert all(torch.equal(final[name], again[name]) for name in final)
    start = safetensors.load_file(whole / "checkpoint-18" / "adapter_model.safetensors")
    assert not all(torch.equal(final[name], start[name]) for name in final)


@pytest.mark.slow
def test_baseline_runs_beside(demo: ModuleType, line: list[str], tmp_path: Path) -> None:
    steps = ["--optim", "adamw_torch", "--max_steps", "4", "--baseline", "--output_dir", str(tmp_path / "out")]
    first, second = demo.main([*line, *steps])
    for metric in ("eval_loss", "eval_accuracy"):
        assert first.before[metric] == second.before[metric]
    assert second.optim == "adamw_torch"
    assert (tmp_path / "out" / "baseline" / "adapter_model.safetensors").exists()
