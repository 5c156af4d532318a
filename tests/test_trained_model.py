"""The model that a job trained, as a folder for `from_pretrained`: its weights are the checkpoint's, and it says which run it is of."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jobs
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from udsstream import SelectionLog, pipeline
from udsstream.errors import ConfigError, ModelError, OutputExistsError, ResumeError
from udsstream.mosaicml.checkpoint import checkpoints_in, model_weights, read_checkpoint
from udsstream.run_config import parse_run_config
from udsstream.selection_log.digest import merkle_root
from udsstream.trained_model import ORIGIN, export_model

TOKENS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The base model, streams, and two finished jobs of 5 steps: `lora` and `whole`."""
    root = tmp_path_factory.mktemp("trained")
    torch.manual_seed(1)
    jobs.write_model(root / "base")
    data = jobs.write_data(root)
    settings = yaml.safe_load(jobs.write_config(root, str(root / "base"), data).read_text())
    settings["optimizer"] = {"lr": 0.05}  # so that what was learned cannot be taken for rounding
    for name, lora in (("lora", {"r": 4, "alpha": 12}), ("whole", None)):
        job = settings | {"save_folder": str(root / name), "model": {"name": str(root / "base"), "lora": lora}}
        pipeline.train(parse_run_config(job, where="test"))
    return root


def weights_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    return model_weights(read_checkpoint(checkpoints_in(run / "checkpoints")[step]))


def merged_by_hand(base: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], scale: float):
    """W + scale · B A in float64, for each weight that has an adapter."""
    merged = {name: value.double() for name, value in base.items()}
    for name, a in adapter.items():
        if ".lora_A." in name:
            b = adapter[name.replace(".lora_A.", ".lora_B.")]
            target = name.split("base_model.model.", 1)[1].split(".lora_A.")[0] + ".weight"
            merged[target] = merged[target] + scale * b.double() @ a.double()
    return merged


def test_adapters_are_merged_into_the_weights(root, tmp_path):
    export_model(root / "lora", tmp_path / "out")
    base = load_file(root / "base" / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    expected = merged_by_hand(base, weights_at(root / "lora", 5), 12 / 4)
    assert exported.keys() == expected.keys() == base.keys()
    changed = 0
    for name, value in exported.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6)
        if torch.equal(value, base[name]):
            assert torch.equal(expected[name], base[name].double())
        else:
            changed += (value - base[name]).abs().max() > 1e-3
    assert changed == 14  # 7 linear layers in each of 2 blocks


def test_a_model_that_was_trained_whole_is_the_checkpoints_bit_for_bit(root, tmp_path):
    export_model(root / "whole", tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    expected = {name.removeprefix("model."): value for name, value in weights_at(root / "whole", 5).items()}
    expected = {name.removeprefix("module."): value for name, value in expected.items()}
    assert exported.keys() <= expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in exported.items())
    base = load_file(root / "base" / "model.safetensors")
    assert not torch.equal(exported["lm_head.weight"], base["lm_head.weight"])


def test_the_folder_is_what_transformers_and_peft_read(root, tmp_path):
    run = root / "lora"
    export_model(run, tmp_path / "merged")
    export_model(run, tmp_path / "adapter", adapter=True)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(root / "base").eval()
    with torch.no_grad():
        before = base(TOKENS).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(TOKENS).logits
        torch.testing.assert_close(merged(TOKENS).logits, adapted, rtol=0, atol=1e-5)
    assert (adapted - before).abs().max() > 1e-2
    for folder in ("merged", "adapter"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert (
            tokenizer("the cat sat").input_ids == AutoTokenizer.from_pretrained(root / "base")("the cat sat").input_ids
        )


def test_the_step_may_be_chosen(root, tmp_path):
    assert set(checkpoints_in(root / "whole" / "checkpoints")) >= {2, 5}
    assert export_model(root / "whole", tmp_path / "newest").step == 5
    assert export_model(root / "whole", tmp_path / "early", step=2).step == 2
    early, weights = load_file(tmp_path / "early" / "model.safetensors"), weights_at(root / "whole", 2)
    (name,) = (name for name in weights if name.endswith("lm_head.weight"))
    assert torch.equal(early["lm_head.weight"], weights[name])
    with pytest.raises(ResumeError, match=r"whole has no checkpoint of step 3; there are those of 2, 4, 5"):
        export_model(root / "whole", tmp_path / "none", step=3)
    assert not (tmp_path / "none").exists()


def test_the_dtype_may_be_chosen(root, tmp_path):
    assert export_model(root / "lora", tmp_path / "half", dtype="bfloat16").dtype == "bfloat16"
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    exported = load_file(tmp_path / "half" / "model.safetensors")
    export_model(root / "lora", tmp_path / "whole")
    for name, value in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(exported[name], value.bfloat16())  # merged first, rounded once


def test_it_says_which_run_it_is_of(root, tmp_path, monkeypatch, capsys):
    """The log's root is that of the log itself, and the weights' digest the one by which a pass with them names its model."""
    written = export_model(root / "lora", tmp_path / "model")
    described = json.loads((tmp_path / "model" / ORIGIN).read_text())
    log = SelectionLog.open(root / "lora")
    assert described["log_root"] == merkle_root(log.heads()).hex()
    assert described["run_id"] == log.run["run_id"]
    assert (described["base_model"], described["step"]) == (str(root / "base"), 5)
    assert described["weights_sha256"] == written.weights_sha256
    code, _, complaint = jobs.udsstream(
        monkeypatch,
        capsys,
        *["curate", "--score", str(root / "train" / "animals"), "--model", str(tmp_path / "model")],
        *[
            "--out",
            str(tmp_path / "best"),
            "--format",
            "jsonl",
            "window=16",
            "selection.projection_dims=[8,4]",
            "device=cpu",
        ],
    )
    assert code == 0, complaint
    facts = json.loads((tmp_path / "best-run" / "run.json").read_text())
    assert written.weights_sha256 in json.dumps(facts)


def test_a_run_that_chose_nothing_has_no_log(root, tmp_path):
    settings = yaml.safe_load((root / "whole" / "config.yaml").read_text())
    job = settings | {"save_folder": str(tmp_path / "run"), "selection": None, "max_duration": "1ba", "eval": None}
    pipeline.train(parse_run_config(job, where="test"))
    written = export_model(tmp_path / "run", tmp_path / "model")
    assert (written.run_id, written.log_root, written.step) == (None, None, 1)


def test_what_cannot_be_done_is_said_before_anything_is_written(root, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.yaml: only a job of `udsstream train`"):
        export_model(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"trained the whole model .* no adapter"):
        export_model(root / "whole", tmp_path / "out", adapter=True)
    with pytest.raises(ConfigError, match=r"dtype='int8': not one of float32, bfloat16, float16"):
        export_model(root / "whole", tmp_path / "out", dtype="int8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text((root / "whole" / "config.yaml").read_text())
    with pytest.raises(ResumeError, match=r"empty has no checkpoint"):
        export_model(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(OutputExistsError, match=r"not empty: it holds notes\.txt"):
        export_model(root / "whole", tmp_path / "mine")
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_code_that_comes_with_the_model_needs_ones_own_word(root, tmp_path, monkeypatch, capsys):
    shutil.copytree(root / "lora", tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    model, mark = tmp_path / "model", tmp_path / "code was run"
    shutil.copytree(settings["model"]["name"], model)
    (model / "coming.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaForCausalLM\n\n\nclass Coming(LlamaForCausalLM):\n    pass\n"
    )
    described = json.loads((model / "config.json").read_text())
    described["auto_map"] = {"AutoModelForCausalLM": "coming.Coming"}
    (model / "config.json").write_text(json.dumps(described))
    settings["model"] |= {"name": str(model), "trust_remote_code": True}
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match=r"asks to run code that comes with the model .* give --trust-remote-code"):
        export_model(tmp_path / "run", tmp_path / "out")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    code, _, _ = jobs.udsstream(
        monkeypatch, capsys, "export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--trust-remote-code"
    )
    assert code == 0
    assert mark.exists()


def test_weights_of_another_model_are_refused(root, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    settings = yaml.safe_load((root / "lora" / "config.yaml").read_text())
    settings["model"]["lora"]["r"] = 2
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    path = checkpoints_in(root / "lora" / "checkpoints")[5]
    (run / "checkpoints" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ResumeError, match=r"is of another model than the run's config\.yaml: .*size mismatch"):
        export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()  # or the next export into it, of another run, would be refused


def test_another_base_model_of_the_same_name_is_refused(root, tmp_path):
    """The adapter would be merged into weights that it was not trained on."""
    run = tmp_path / "run"
    shutil.copytree(root / "lora", run)
    shutil.copytree(root / "base", tmp_path / "base")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["name"] = str(tmp_path / "base")
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert export_model(run, tmp_path / "same").step == 5  # only moved
    weights = load_file(tmp_path / "base" / "model.safetensors")
    name = next(iter(weights))
    weights[name][0] += 1e-3
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResumeError, match=r"(?s)-ba5-rank0\.pt was saved with another base model.*frozen weights: was"):
        export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_is_gone_leaves_nothing_behind(root, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(root / "lora", run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["name"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ModelError, match=r"model\.name='.*gone': cannot be loaded"):
        export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_was_interrupted_is_done_again(root, tmp_path, monkeypatch):
    """Until all is there nothing is; what an interrupted one left does not get into the result."""

    def interrupted(self, folder, **settings):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        (Path(folder) / "tokenizer.model").write_bytes(b"as another version of transformers would")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_model(root / "lora", tmp_path / "out")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["_job"]
    written = export_model(root / "lora", tmp_path / "out")
    assert not (tmp_path / "out" / "_job").exists()
    other = export_model(root / "lora", tmp_path / "other")
    assert written == other
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}


def test_an_export_that_was_interrupted_between_its_files_is_completed(root, tmp_path, monkeypatch):
    expected = export_model(root / "lora", tmp_path / "other")
    moves = []

    def killed(source, target, replace=os.replace):
        if Path(target).parent == tmp_path / "out":
            moves.append(target)
            if len(moves) == 3:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("udsstream.job_folder.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            export_model(root / "lora", tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assert export_model(root / "lora", tmp_path / "out") == expected
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "other").iterdir()}


def test_the_command(root, tmp_path, monkeypatch, capsys):
    code, printed, _ = jobs.udsstream(monkeypatch, capsys, "export", str(root / "lora"), "--out", str(tmp_path / "out"))
    digest = json.loads((tmp_path / "out" / ORIGIN).read_text())["weights_sha256"][:12]
    assert (code, printed) == (0, f"{tmp_path / 'out'}: the model after 5 steps, float32, weights {digest}\n")
