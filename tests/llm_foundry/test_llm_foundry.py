"""Whole runs through llm-foundry's own entry, in an environment of its own; see docs/llm_foundry.md.

    python tests/llm_foundry/environment.py DIR
    python -m pytest tests/llm_foundry --llm-foundry DIR

The configuration is the documented one, made small. Logs, audits and checkpoints are read in this environment.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from streaming import MDSWriter
from transformers import AutoTokenizer

from udsstream import SelectionLog
from udsstream.audit.run import audit
from udsstream.mosaicml.checkpoint import model_weights, read_checkpoint

pytestmark = [pytest.mark.llm_foundry, pytest.mark.timeout(1200)]
HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "llm_foundry.md"

PAIRS = [
    {"prompt": jobs.SENTENCES[i % 5], "response": f"{jobs.SENTENCES[i * 2 % 5]} {'the ' * (i % 7)}"} for i in range(61)
]


@pytest.fixture(scope="session")
def python(pytestconfig) -> Path:
    folder = pytestconfig.getoption("--llm-foundry")
    if folder is None:
        pytest.skip(
            "needs an environment with llm-foundry: python tests/llm_foundry/environment.py DIR, then --llm-foundry DIR"
        )
    return Path(folder) / "bin" / "python"


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A model and its tokenizer, the same pairs as JSON Lines and as a stream, and texts and tokens as streams; 61 samples each."""
    root = tmp_path_factory.mktemp("inputs")
    jobs.write_model(root / "model")
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    if tokenizer.pad_token is None:  # llm-foundry's text loader asks for one, though it packs rows full
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        tokenizer.save_pretrained(root / "model")
    (root / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    jobs.write_rows(root / "pairs" / "train", PAIRS)
    jobs.write_rows(root / "texts" / "train", [{"text": f"{pair['prompt']} {pair['response']}"} for pair in PAIRS])
    rng = np.random.default_rng(0)
    with MDSWriter(out=str(root / "tokens" / "train"), columns={"tokens": "ndarray:int32"}) as writer:
        for _ in PAIRS:
            writer.write({"tokens": rng.integers(1, 20, 24).astype(np.int32)})  # 1 is the end of a text
    return root


@dataclasses.dataclass(frozen=True)
class Foundry:
    """One way to train: settings over the documented configuration."""

    python: Path
    inputs: Path
    folder: Path
    loader: str
    model: str = "llama"
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def config(self, name: str, **more: Any) -> dict[str, Any]:
        (example,) = [block for block in _yaml_blocks() if "train_loader" in block]
        config: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(example))  # type: ignore[assignment]
        config["variables"]["model"] = str(self.inputs / "model")
        config["algorithms"]["uds"]["projection_dims"] = [8, 4]
        config["tokenizer"]["kwargs"]["padding_side"] = "left" if self.model == "llama" else "right"  # MPT's demand
        config |= {
            "run_name": name,
            "max_seq_len": 24,
            "save_folder": str(self.folder / name),
            "save_interval": "5ba",
            "max_duration": "12ba",
            "precision": "fp32",
            "optimizer": {"name": "decoupled_adamw", "lr": 1e-3},
            "scheduler": {"name": "constant_with_warmup", "t_warmup": "2ba"},  # one that the duration does not stretch
            "global_train_batch_size": 8,
            "device_train_microbatch_size": 1,
            "log_to_console": False,
            "python_log_level": "warning",
        }
        dataset: dict[str, Any] = {"max_seq_len": 24, "shuffle": True, "split": "train"}
        if self.loader == "hf":
            config["train_loader"]["dataset"]["hf_kwargs"]["data_files"]["train"] = str(self.inputs / "train.jsonl")
        else:
            where = {"finetuning": "pairs"}.get(self.loader, self.loader)
            dataset |= {"remote": str(self.inputs / where), "local": str(self.folder / f"cache-{name}")}
            if self.loader == "finetuning":
                dataset |= {"decoder_only_format": True}
            if self.loader == "tokens":  # several texts in a row, kept apart by `sequence_id`
                dataset |= {"eos_token_id": 1, "token_encoding_type": "int32"}
            name_of_loader = "finetuning" if self.loader == "finetuning" else "text"
            config["train_loader"] |= {"name": name_of_loader, "dataset": dataset}
        if self.model == "llama":
            config["model"]["config_overrides"] = {"attention_dropout": 0.1}
        else:
            config["model"] = {
                "name": "mpt_causal_lm",
                "init_device": "cpu",
                "loss_fn": "torch_crossentropy",  # its default needs flash-attn
                "d_model": 32,
                "n_heads": 4,
                "n_layers": 2,
                "expansion_ratio": 2,
                "max_seq_len": 24,
                "vocab_size": 24,
                "resid_pdrop": 0.1,
                "tie_word_embeddings": self.model == "mpt tied",
                "logit_scale": "inv_sqrt_d_model" if self.model == "mpt tied" else None,
                "attn_config": {"attn_impl": "torch", "attn_uses_sequence_id": self.loader == "tokens"},
            }
        return OmegaConf.to_container(OmegaConf.merge(config, self.more, more))  # type: ignore[return-value]

    def train(self, name: str, *, kill_at: int | None = None, ranks: int = 1, fails: bool = False, **more: Any) -> str:
        """Runs it, from its start or its newest checkpoint; what it printed."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{name}.yaml"
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(self.config(name, **more))))
        launcher = [str(self.python)]
        if ranks > 1:
            said = self.folder / f"{name}.rank{{rank}}"
            launcher += ["-m", "composer.cli.launcher", "-n", str(ranks), "--stdout", str(said), "--stderr", str(said)]
        arguments = [*launcher, str(HERE / "run.py"), str(path)] + ([str(kill_at)] if kill_at is not None else [])
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(self.folder / "hf")}
        done = subprocess.run(
            arguments, capture_output=True, text=True, cwd=self.folder, env=environment, timeout=600, check=False
        )
        expected = -9 if kill_at is not None else 1 if fails else 0
        assert done.returncode == expected, (done.stdout + done.stderr)[-5000:]
        return done.stdout + done.stderr

    def log(self, name: str) -> SelectionLog:
        return SelectionLog.open(self.folder / name / "selection_log")

    def weights(self, name: str, step: int) -> dict[str, torch.Tensor]:
        (path,) = (self.folder / name).glob(f"ep*-ba{step}-rank0.pt")
        return torch.load(path, map_location="cpu", weights_only=False)["state"]["model"]


def _yaml_blocks() -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```$", DOCS.read_text(), flags=re.MULTILINE | re.DOTALL)


WAYS = [("hf", "llama"), ("finetuning", "llama"), ("texts", "mpt"), ("tokens", "mpt tied")]


@pytest.fixture(scope="session", params=WAYS, ids=["-".join(way).replace(" ", "-") for way in WAYS])
def way(request, python, inputs, tmp_path_factory) -> Foundry:
    """After a whole run of 12 steps, 7 to an epoch, named `whole`."""
    loader, model = request.param
    foundry = Foundry(python, inputs, tmp_path_factory.mktemp(loader), loader, model)
    foundry.train("whole")
    return foundry


def test_the_log_is_whole_and_says_what_ids_are(way):
    log = way.log("whole")
    assert log.run["loader"]["sample_ids"] == ("position" if way.loader == "hf" else "dataset")
    assert log.run["selection"]["max_seq_len"] == 24
    assert log.run["selection"]["keep"] == 0.25
    report = audit(log.root)
    assert report.findings == ()
    assert "coverage" in " ".join(report.checked)
    table = log.table().to_pandas()
    assert table.groupby("step").size().tolist() == [8] * 12
    assert table.groupby("step")["selected"].sum().tolist() == [2] * 12
    first = table[table["epoch"] == 0]["sample_id"]
    assert first.nunique() == len(first) == 56
    assert table["sample_id"].between(0, 60).all()


def test_ids_name_their_samples(way, inputs):
    """Lengths in the log are those of the samples that the ids name."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    table = way.log("whole").table(columns=["sample_id", "tokens"]).to_pandas()
    for number, tokens in table.itertuples(index=False):
        pair = PAIRS[number]
        words = len(tokenizer(f"{pair['prompt']} {pair['response']}")["input_ids"])
        assert tokens == {"tokens": 24, "texts": words}.get(way.loader, words + 1)  # llm-foundry ends a response


@pytest.mark.parametrize("interval", [5, 7], ids=["in the middle of an epoch", "at the end of one"])
def test_a_killed_run_goes_on_to_the_same_weights(way, interval):
    name = f"killed-{interval}"
    way.train(name, kill_at=interval + 1, save_interval=f"{interval}ba")
    way.train(name, save_interval=f"{interval}ba")
    expected, found = way.weights("whole", 12), way.weights(name, 12)
    assert {key: torch.equal(value, found[key]) for key, value in expected.items()} == dict.fromkeys(expected, True)
    columns = ["step", "sample_id", "tokens", "score", "selected", "train_order"]
    assert way.log(name).table(columns=columns).equals(way.log("whole").table(columns=columns))
    assert audit(way.log(name).root).findings == ()


def test_dropout_matters_in_these_tests(python, inputs, tmp_path):
    """Otherwise equal weights would say nothing of the random state."""
    foundry = Foundry(python, inputs, tmp_path / "f", "hf")
    for dropout in (0.1, 0.0):
        foundry.train(f"d{dropout}", model={"config_overrides": {"attention_dropout": dropout}}, max_duration="5ba")
    weights = [foundry.weights(f"d{dropout}", 5) for dropout in (0.1, 0.0)]
    assert not all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_a_run_killed_before_its_first_checkpoint_begins_anew(python, inputs, tmp_path):
    foundry = Foundry(python, inputs, tmp_path / "f", "hf")
    foundry.train("early", kill_at=2)
    foundry.train("early", max_duration="5ba")
    log = foundry.log("early")
    assert log.steps().tolist() == list(range(5))
    assert set(log.table(columns=["attempt"])["attempt"].to_pylist()) == {1}


def test_two_ranks_choose_what_one_does(python, inputs, tmp_path):
    foundry = Foundry(python, inputs, tmp_path / "f", "hf")
    model = {"config_overrides": {"attention_dropout": 0.0}}
    tokens = {"accumulate_train_batch_on_tokens": True, "max_duration": "5ba", "model": model}
    foundry.train("one", **tokens)
    foundry.train("two", ranks=2, **tokens)
    columns = ["step", "position", "sample_id", "tokens", "selected"]
    order = [("step", "ascending"), ("position", "ascending")]
    one, two = (foundry.log(name).table(columns=columns).sort_by(order) for name in ("one", "two"))
    assert one.equals(two)
    assert audit(foundry.log("two").root).findings == ()


def test_packing_is_refused_before_training(python, inputs, tmp_path):
    foundry = Foundry(python, inputs, tmp_path / "f", "hf")
    said = foundry.train("packed", fails=True, train_loader={"dataset": {"packing_ratio": 2.0}})
    assert "ConfigError: the data loader packs several samples into one row" in said
    assert not (tmp_path / "f" / "packed" / "selection_log").exists()


def test_a_setting_that_does_not_exist_is_named(python, inputs, tmp_path):
    said = Foundry(python, inputs, tmp_path / "f", "hf").train("typo", fails=True, algorithms={"uds": {"kep": 0.5}})
    assert "ConfigError: algorithms.uds: 'kep' is no setting of the selection; it has method, keep," in said


def test_adapters_are_trained_by_peft_config(python, inputs, tmp_path):
    foundry = Foundry(python, inputs, tmp_path / "f", "hf")
    lora = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
    }
    for name in ("whole", "killed"):
        foundry.train(name, kill_at=7 if name == "killed" else None, model={"peft_config": lora})
    foundry.train("killed", model={"peft_config": lora})
    expected, found = foundry.weights("whole", 12), foundry.weights("killed", 12)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert audit(foundry.log("killed").root).findings == ()
    (checkpoint,) = (tmp_path / "f" / "killed").glob("*ba12-rank0.pt")
    assert model_weights(read_checkpoint(checkpoint)).keys() == expected.keys()
