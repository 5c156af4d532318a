"""Checkpoints are read without running what they hold, and what cannot be read is named."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from tiny import TinyRun, write_stream

from udsstream.errors import ResumeError
from udsstream.mosaicml.checkpoint import checkpoints_in, model_weights, read_checkpoint, selection_state


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    stream = write_stream(folder / "stream")
    TinyRun(streams=(str(stream),), folder=str(folder), duration="4ba", save_interval="2ba").run()
    return folder


class Shell:
    """Runs a command when it is unpickled in earnest."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_checkpoint_of_a_selecting_run(run):
    path = checkpoints_in(run / "checkpoints")[4]
    loaded = read_checkpoint(path)
    state = selection_state(loaded)
    assert state is not None
    assert state["step"] == 4
    assert state["memory"]["pushed"] == 8
    in_earnest = torch.load(path, weights_only=False)["state"]["model"]
    weights = model_weights(loaded)
    assert weights.keys() == in_earnest.keys()
    assert all(torch.equal(weights[name], in_earnest[name]) for name in weights)


def test_the_checkpoints_of_a_folder(run, tmp_path):
    assert list(checkpoints_in(run / "checkpoints")) == [2, 4]
    assert checkpoints_in(tmp_path / "none") == {}
    for name in ("ep0-ba7-rank0.pt", "ep10-ba7-rank0.pt", "ep2-ba7-rank0.pt", "ep3-ba9-rank1.pt", "latest-rank0.pt"):
        (tmp_path / name).touch()
    assert checkpoints_in(tmp_path) == {7: tmp_path / "ep10-ba7-rank0.pt"}


def test_code_in_a_checkpoint_is_not_run(run, tmp_path):
    path = checkpoints_in(run / "checkpoints")[4]
    hostile = torch.load(path, weights_only=False)
    hostile["state"]["callbacks"] = {"x": Shell(tmp_path / "mark")}
    torch.save(hostile, tmp_path / "hostile.pt")
    with pytest.raises(ResumeError, match=r"hostile.pt is not read: it names posix.system, which could run code"):
        read_checkpoint(tmp_path / "hostile.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Shell(tmp_path / "mark")))
    with pytest.raises(ResumeError, match=r"plain.pt is not read: "):
        read_checkpoint(tmp_path / "plain.pt")
    assert not (tmp_path / "mark").exists()
    torch.load(tmp_path / "hostile.pt", weights_only=False)
    assert (tmp_path / "mark").exists()  # it would have been


def test_an_algorithm_that_composer_would_evaluate_is_refused(run, tmp_path):
    path = checkpoints_in(run / "checkpoints")[4]
    hostile = torch.load(path, weights_only=False)
    hostile["state"]["algorithms"].append(("Alibi", {"repr": "__import__('os').system('true')"}))
    torch.save(hostile, tmp_path / "hostile.pt")
    with pytest.raises(ResumeError, match=r"evaluate \"__import__\('os'\).system\('true'\)\" as an algorithm"):
        read_checkpoint(tmp_path / "hostile.pt")


@pytest.mark.parametrize(
    "algorithms", [[1, 2], 5, None, "ab", ["ab"], ["abc"], [(["a"], {})], [("a", {}, {})], {1: {}}, {"a"}], ids=repr
)
def test_algorithms_that_are_none_are_named(algorithms, tmp_path):
    torch.save({"state": {"model": {}, "algorithms": algorithms}}, tmp_path / "hostile.pt")
    with pytest.raises(ResumeError, match=r"hostile\.pt is (a file of torch.* pairs of a name and a state|not read: )"):
        read_checkpoint(tmp_path / "hostile.pt")


@pytest.mark.parametrize("algorithms", [[], {}, [("functional", {})], {"__name__": 5}], ids=repr)
def test_names_that_composer_does_not_evaluate_pass(algorithms, tmp_path):
    torch.save({"state": {"model": {}, "algorithms": algorithms}}, tmp_path / "plain.pt")
    assert selection_state(read_checkpoint(tmp_path / "plain.pt")) is None


@pytest.mark.parametrize("model", [5, None, [1]])
def test_a_model_that_is_none_is_named(model, tmp_path):
    torch.save({"state": {"model": model}}, tmp_path / "hostile.pt")
    with pytest.raises(ResumeError, match=r"hostile\.pt is a file of torch, but no checkpoint of Composer"):
        read_checkpoint(tmp_path / "hostile.pt")


def test_what_is_no_checkpoint_is_named(run, tmp_path):
    path = checkpoints_in(run / "checkpoints")[4]
    (tmp_path / "torn.pt").write_bytes(path.read_bytes()[:-5000])
    (tmp_path / "empty.pt").touch()
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    for name, message in (
        ("none", "there is no such checkpoint"),
        ("torn", "cannot be read as a checkpoint"),
        ("empty", "cannot be read as a checkpoint"),
        ("other", "no checkpoint of Composer"),
        ("tensor", "no checkpoint of Composer"),
    ):
        with pytest.raises(ResumeError, match=rf"{name}.pt.*{message}"):
            read_checkpoint(tmp_path / f"{name}.pt")


@pytest.mark.parametrize(
    "content",
    [
        b"junk\n" * 3,
        b"\x80\x02K\x01R.",
        b"\x80\x02]K\x05aa.",  # more is taken from the stack than there is
        b"\x80\x02)\x81.",
    ],
)
def test_bytes_that_torch_did_not_write_are_named_so(content, tmp_path):
    path = tmp_path / "junk.pt"
    path.write_bytes(content)
    with pytest.raises(ResumeError, match=r"junk\.pt cannot be read as a checkpoint: torch.save has not written it so"):
        read_checkpoint(path)


def test_a_checkpoint_with_flipped_bytes_is_read_or_named(run, tmp_path):
    """The pickle within the archive, stored again with its checksum, so that the unpickler sees what was changed."""
    good = checkpoints_in(run / "checkpoints")[4]
    with zipfile.ZipFile(good) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in members if name.endswith("data.pkl"))
    rng, path, refused = random.Random(7), tmp_path / "bad.pt", 0
    for _ in range(200):
        changed = bytearray(members[pickled])
        for _ in range(3):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, content in members.items():
                archive.writestr(name, bytes(changed) if name == pickled else content)
        try:
            read_checkpoint(path)
        except ResumeError:
            refused += 1
    assert refused > 20


def test_a_run_without_selection_has_no_state_of_it(run, tmp_path):
    stream = str(run / "stream")
    TinyRun(streams=(stream,), folder=str(tmp_path), duration="2ba", save_interval="2ba", selection=None).run()
    path = checkpoints_in(tmp_path / "checkpoints")[2]
    assert selection_state(read_checkpoint(path)) is None
