"""Attestations: made from an audit, signed, held against the log again, and refused when anything about them is wrong."""

from __future__ import annotations

import base64
import contextlib
import copy
import datetime
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uds_log
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from numpy_run import NumpyRun
from typer.testing import CliRunner

from udsstream.audit import dsse
from udsstream.audit.attestation import (
    PAYLOAD_TYPE,
    make_statement,
    read_attestation,
    render,
    serialize,
    sign,
    verify_attestation,
)
from udsstream.audit.report import AuditReport, Finding
from udsstream.audit.run import audit
from udsstream.cli import app
from udsstream.errors import AttestationError, LogError
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.writer import SelectionLogWriter

MADE = datetime.datetime(2026, 11, 24, 4, 0, tzinfo=datetime.timezone.utc)


def report_of(root: Path, **changes: Any) -> AuditReport:
    """What an audit that found nothing says of the log; the audit itself has its own tests."""
    seen = SelectionLog.open(root).verify()
    given: dict[str, Any] = {
        "run_id": "9f0e",
        "steps": seen.steps,
        "rows": seen.rows,
        "attempts": seen.attempts,
        "findings": (),
        "checked": ("every chain",),
        "unchecked": ("the data",),
        "anchored": False,
    }
    return AuditReport(**given | changes)


def attest(root: Path) -> dict[str, Any]:
    return make_statement(root, report_of(root), made_at=MADE)


def pem(key: Any, passphrase: bytes | None = None) -> bytes:
    how = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def public_pem(key: Any) -> bytes:
    public = key.public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
PRIVATE, PUBLIC = pem(KEY), public_pem(KEY)

LOGS: dict[str, dict[str, Any]] = {
    "checkpoints": {"checkpoints": (4, 8)},
    "resumed": {"checkpoints": (4, 8), "resume_at": 6},
    "ranks": {"checkpoints": (4,), "ranks": 3},
    "tail": {"checkpoints": (4, 8), "embeddings": "tail"},
    "no checkpoint": {},
}


@pytest.fixture(params=LOGS)
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return uds_log.write(tmp_path / "a", **LOGS[request.param])


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return uds_log.write(tmp_path / "plain", checkpoints=(4, 8))


@pytest.fixture
def envelope(plain: Path) -> dict[str, Any]:
    return sign(attest(plain), PRIVATE)


# -- what is attested --------------------------------------------------------------------------------------------


def test_the_subjects_are_run_json_the_heads_and_the_end(plain: Path) -> None:
    statement = attest(plain)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    digests = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    assert list(digests) == ["9f0e/run.json", "9f0e/_heads/ba00000004", "9f0e/_heads/ba00000008", "9f0e/end"]
    assert digests["9f0e/run.json"] == hashlib.sha256((plain / "run.json").read_bytes()).hexdigest()
    heads = json.loads((plain / "_heads" / "ba00000004.json").read_text())
    assert digests["9f0e/_heads/ba00000004"] == heads["root"]
    (head,) = heads["heads"]
    assert heads["root"] == hashlib.sha256(b"\0" + bytes.fromhex(head)).hexdigest()  # RFC 6962, one leaf
    predicate = statement["predicate"]
    assert predicate["madeAt"] == "2026-11-24T04:00:00Z"
    assert predicate["covered"] == {"steps": 12, "rows": 78, "attempts": 1}
    assert predicate["audit"]["checked"] == ["every chain"]
    assert predicate["audit"]["unchecked"] == ["the data"]
    assert predicate["audit"]["verdict"].startswith("internally consistent")
    assert predicate["streams"][1] == {"name": "long", "samples": 11, "indexSha256": f"{1:064x}"}
    assert predicate["selection"]["method"] == "uds"
    assert predicate["selectionFingerprint"] == uds_log.run()["selection_fingerprint"]


def test_equal_content_gives_equal_bytes(plain: Path) -> None:
    assert serialize(attest(plain)) == serialize(attest(plain))
    shuffled = dict(reversed(list(attest(plain).items())))
    assert serialize(shuffled) == serialize(attest(plain))
    assert sign(attest(plain), PRIVATE) == sign(shuffled, PRIVATE)  # Ed25519 is deterministic


def test_a_report_of_another_run_is_not_attested(plain: Path) -> None:
    with pytest.raises(AttestationError, match=r"the audit is of run other, but .* holds run 9f0e"):
        make_statement(plain, report_of(plain, run_id="other"))


@pytest.mark.parametrize("sealed", [False, True])
def test_what_was_logged_after_the_audit_is_not_attested(tmp_path: Path, sealed: bool) -> None:
    root = tmp_path / "log"
    run = NumpyRun(root=root).begin().steps(0, 6).checkpoint(6)
    report = audit(root)
    assert make_statement(root, report)["predicate"]["end"][0]["selection"]["step"] == 6
    if sealed:  # the same rows in other files
        run.seal()
        assert make_statement(root, report)["predicate"]["end"][0]["selection"]["step"] == 6
    run.steps(6, 7)
    with pytest.raises(
        AttestationError, match=r"gone on since it was audited: rank 0's selection now ends before step 7"
    ):
        make_statement(root, report)
    make_statement(root, audit(root))
    run.release()


# -- it holds ----------------------------------------------------------------------------------------------------


def test_what_was_attested_holds(root: Path) -> None:
    statement = attest(root)
    for attestation, key, signature in (
        (statement, None, "none"),
        (sign(statement, PRIVATE), None, "not checked"),
        (sign(statement, PRIVATE), PUBLIC, "verified"),
        (serialize(sign(statement, PRIVATE)), PUBLIC, "verified"),
    ):
        check = verify_attestation(attestation, root, key)
        assert (check.findings, check.exit_code, check.signature) == ((), 0, signature)
        assert all(subject.holds for subject in check.subjects)
        assert len(check.subjects) == len(statement["subject"])
        steps = SelectionLog.open(root).steps()
        assert f"what was attested on 2026-11-24T04:00:00Z, the steps below {steps[-1] + 1}, by" in check.verdict
        assert json.loads(json.dumps(check.as_dict()))["exit_code"] == 0
        text = render(check, "a.json")
        assert "the data" not in check.unchecked  # the audit's, not ours
        assert "It says: internally consistent" in text
        if signature == "none":
            assert any("it is not signed" in note for note in check.unchecked)
        if signature == "not checked":
            assert any("no public key was given" in note for note in check.unchecked)


@pytest.mark.parametrize("resume_at", [4, 8])
def test_it_holds_when_the_run_goes_on(tmp_path: Path, resume_at: int) -> None:
    root = uds_log.write(tmp_path / "a", checkpoints=(4, 8))
    envelope = sign(attest(root), PRIVATE)
    heads = json.loads((root / "_heads" / f"ba{resume_at:08d}.json").read_text())["heads"]
    writer = SelectionLogWriter.resume(root, step=resume_at, head=bytes.fromhex(heads[0]))
    uds_log.append(writer, resume_at, 9)
    writer.checkpoint(9, heads=[writer.sync()], pushed=0, buffer_digest=bytes(32))
    uds_log.append(writer, 9, 15)
    writer.close()
    check = verify_attestation(envelope, root, PUBLIC)
    assert check.findings == ()
    assert "what was logged after the attestation was made" in check.unchecked


def test_it_holds_when_a_later_attempt_moves_the_heads_aside(tmp_path: Path) -> None:
    root = uds_log.write(tmp_path / "a", checkpoints=(4, 8))
    envelope = sign(attest(root), PRIVATE)
    head = json.loads((root / "_heads" / "ba00000004.json").read_text())["heads"][0]
    writer = SelectionLogWriter.resume(root, step=4, head=bytes.fromhex(head))
    uds_log.append(writer, 4, 8)
    writer.checkpoint(8, heads=[writer.sync()], pushed=0, buffer_digest=bytes(32))
    writer.close()
    assert (root / "_heads" / "ba00000008-a0.json").exists()
    assert verify_attestation(envelope, root, PUBLIC).findings == ()
    again = verify_attestation(sign(attest(root), PRIVATE), root, PUBLIC)
    assert "9f0e/_heads/ba00000008-a0" in {subject.name for subject in again.subjects}
    assert again.findings == ()


def test_a_live_log_is_attested_as_far_as_it_goes(tmp_path: Path) -> None:
    writer = SelectionLogWriter.create(tmp_path / "a", run=uds_log.run(), embeddings="none")
    uds_log.append(writer, 0, 3)
    envelope = sign(attest(tmp_path / "a"), PRIVATE)
    uds_log.append(writer, 3, 6)
    assert verify_attestation(envelope, tmp_path / "a", PUBLIC).findings == ()
    writer.close()
    check = verify_attestation(envelope, tmp_path / "a", PUBLIC)
    assert check.findings == ()
    assert "what was logged after the attestation was made" in check.unchecked


# -- the log changed afterwards ----------------------------------------------------------------------------------


def rewrite(root: Path, **changes: Any) -> None:
    """Puts another, flawless log of the same run in the place of this one."""
    shutil.rmtree(root)
    uds_log.write(root, **changes)


def cut_checkpoint(root: Path) -> None:
    (root / "_heads" / "ba00000008.json").unlink()


def edit_run(root: Path) -> None:
    text = (root / "run.json").read_text()
    (root / "run.json").write_text(text.replace('"pairs"', '"peers"'))


def flip_segment(root: Path) -> None:
    path = next((root / "selection").rglob("*.arrow"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_the_end(root: Path) -> None:
    """A log that ends at the last checkpoint, and says nothing of having gone on."""
    rewrite(root, steps=8, checkpoints=(4, 8))


def rewrite_after_the_last_checkpoint(root: Path) -> None:
    shutil.rmtree(root)
    writer = SelectionLogWriter.create(
        root, run=uds_log.run(), embeddings="none", embedding_dim=uds_log.DIM, buffer_capacity=uds_log.CAPACITY
    )
    for first, stop in ((0, 4), (4, 8)):
        uds_log.append(writer, first, stop)
        writer.checkpoint(stop, heads=[writer.sync()], pushed=0, buffer_digest=bytes(32))
    uds_log.append(writer, 8, 12, seed=1)
    writer.close()


@pytest.mark.parametrize(
    ("tamper", "found"),
    [
        (lambda root: rewrite(root, checkpoints=(4, 8), seed=1), "the log was rewritten"),
        (lambda root: rewrite(root, checkpoints=(4, 8), run={"resolved_alpha": 0.25}), "run.json: its SHA-256 is"),
        (lambda root: rewrite(root, checkpoints=(4, 8), run={"run_id": "other"}), "the attestation is of run 9f0e"),
        (lambda root: rewrite(root, checkpoints=(4,)), "which was attested: it was cut"),
        (cut_checkpoint, "which was attested: it was cut"),
        (edit_run, "run.json: its SHA-256 is"),
        (flip_segment, "restore|Restore"),
        (cut_the_end, "decisions were attested, but the log has"),
        (rewrite_after_the_last_checkpoint, "rows were changed or cut"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_log_that_was_changed_afterwards_is_found(plain: Path, tamper: Any, found: str) -> None:
    envelope = sign(attest(plain), PRIVATE)
    assert verify_attestation(envelope, plain, PUBLIC).findings == ()
    tamper(plain)
    check = verify_attestation(envelope, plain, PUBLIC)
    assert check.exit_code == 1
    assert any(any(words in finding for words in found.split("|")) for finding in check.findings), check.findings
    assert check.verdict.endswith("this is not a log that was attested as intact")
    assert "Found" in render(check, "a.json")


def test_the_memory_at_a_checkpoint_is_attested_too(tmp_path: Path) -> None:
    from udsstream.selection_log.manifest import checked_json, parse_checked_json

    root = uds_log.write(tmp_path / "a", checkpoints=(4,), embeddings="tail")
    envelope = sign(attest(root), PRIVATE)
    path = root / "_heads" / "ba00000004.json"
    value = parse_checked_json(path.read_bytes()[:-1]) | {"buffer_rows": None, "buffer_sha256": None}
    path.write_bytes(checked_json(value) + b"\n")
    SelectionLog.open(root).verify()  # no digest of the log covers it
    (finding,) = verify_attestation(envelope, root, PUBLIC).findings
    assert "the memory's vectors have the SHA-256 None" in finding


def test_an_audit_with_findings_is_attested_as_such(plain: Path) -> None:
    report = report_of(plain, findings=(Finding(check="top-k", message="!"),), found={"top-k": 1})
    statement = make_statement(plain, report, made_at=MADE)
    assert statement["predicate"]["audit"]["exitCode"] == 1
    (finding,) = verify_attestation(statement, plain).findings
    assert finding.startswith("the audit that was attested had findings itself: 1 finding (top-k)")


def test_a_bare_statement_that_was_edited_contradicts_run_json(plain: Path) -> None:
    statement = attest(plain)
    statement["predicate"]["selection"]["keep"] = 3
    (finding,) = verify_attestation(statement, plain).findings
    assert "is not what run.json says" in finding


def test_an_attestation_of_nothing_does_not_hold(plain: Path) -> None:
    statement = attest(plain)
    statement["subject"] = [
        statement["subject"][0],
        {"name": "9f0e/end", "digest": {"sha256": hashlib.sha256().hexdigest()}},
    ]
    statement["predicate"] |= {"checkpoints": [], "end": []}
    (finding,) = verify_attestation(statement, plain).findings
    assert finding == "rank 0: the attestation says nothing of it, but the run began with 1 ranks"


def test_a_folder_without_a_log_is_an_error(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(LogError, match="is not a selection log"):
        verify_attestation(attest(plain), tmp_path / "nothing")


# -- attestations that are refused -------------------------------------------------------------------------------


def test_another_key_is_named(envelope: dict[str, Any], plain: Path) -> None:
    theirs, ours = dsse.key_id(OTHER.public_key()), dsse.key_id(KEY.public_key())
    with pytest.raises(AttestationError, match=f"signed by another key: by {ours}, not by {theirs}"):
        verify_attestation(envelope, plain, public_pem(OTHER))
    del envelope["signatures"][0]["keyid"]
    with pytest.raises(AttestationError, match="by a key that it does not name"):
        verify_attestation(envelope, plain, public_pem(OTHER))


def test_a_keyid_decides_nothing(envelope: dict[str, Any], plain: Path) -> None:
    envelope["signatures"][0]["keyid"] = "somebody"
    assert verify_attestation(envelope, plain, PUBLIC).keyids == (dsse.key_id(KEY.public_key()),)
    envelope["signatures"][0]["keyid"] = dsse.key_id(OTHER.public_key())
    with pytest.raises(AttestationError, match="does not fit the payload"):
        verify_attestation(envelope, plain, public_pem(OTHER))


def test_several_keys_may_have_signed(envelope: dict[str, Any], plain: Path) -> None:
    envelope["signatures"] += sign(attest(plain), pem(OTHER))["signatures"]
    for key in (KEY, OTHER):
        assert verify_attestation(envelope, plain, public_pem(key)).signature == "verified"
    assert len(verify_attestation(envelope, plain).keyids) == 2


def test_url_safe_base64_is_accepted(envelope: dict[str, Any], plain: Path) -> None:
    for entry, name in ((envelope, "payload"), (envelope["signatures"][0], "sig")):
        entry[name] = base64.urlsafe_b64encode(base64.b64decode(entry[name])).decode()
    assert verify_attestation(envelope, plain, PUBLIC).signature == "verified"


def change_payload(envelope: dict[str, Any]) -> None:
    payload = base64.b64decode(envelope["payload"])
    envelope["payload"] = base64.b64encode(payload.replace(b'"rows":78', b'"rows":77')).decode()


def spell_otherwise(envelope: dict[str, Any]) -> None:
    """Sets bits that the last digit of 86 does not use."""
    signature = envelope["signatures"][0]["sig"]
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    envelope["signatures"][0]["sig"] = signature[:-3] + digits[digits.index(signature[-3]) | 1] + "=="


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change_payload, "does not fit the payload: one of them was changed after signing"),
        (spell_otherwise, "signature 1 is not canonical base64"),
        (lambda e: e.update(payloadType="application/json"), "payloadType is 'application/json', expected"),
        (lambda e: e.pop("payloadType"), "payloadType is None"),
        (lambda e: e.pop("signatures"), "has no signature"),
        (lambda e: e.update(signatures=[]), "has no signature"),
        (lambda e: e.update(signatures={}), "has no signature"),
        (lambda e: e.update(signatures=e["signatures"] * 2), "has the same signature twice"),
        (
            lambda e: e["signatures"].append({"keyid": e["signatures"][0]["keyid"], "sig": "AAAA"}),
            "has the same keyid twice",
        ),
        (lambda e: e.update(signatures=[{"sig": "A" * 4}] * 65), "has 65 signatures, at most 64"),
        (lambda e: e.update(signatures=["x"]), "signature 1 of the envelope is not an object"),
        (
            lambda e: e.update(signatures=[{"keyid": "\x1b[2J", "sig": "AAAA"}]),
            "is not an object with 'keyid' and 'sig'",
        ),
        (lambda e: e["signatures"][0].pop("sig"), "signature 1 is NoneType, expected base64 text"),
        (lambda e: e["signatures"][0].update(sig="A"), "signature 1 is not base64"),
        (lambda e: e["signatures"][0].update(sig="AAAA"), "does not fit the payload"),
        (lambda e: e.update(payload=e["payload"] + "\n"), "payload is not base64|payload is not canonical base64"),
        (lambda e: e.update(payload=e["payload"][:40] + "-" + e["payload"][41:43] + "/"), "not (canonical )?base64"),
        (lambda e: e.update(payload="é"), "payload is not base64"),
        (lambda e: e.pop("payload"), "payload is NoneType"),
    ],
)
def test_a_spoilt_envelope_is_refused(envelope: dict[str, Any], plain: Path, spoil: Any, message: str) -> None:
    spoil(envelope)
    with pytest.raises(AttestationError, match=message):
        verify_attestation(envelope, plain, PUBLIC)


def test_a_stripped_signature_does_not_pass_for_none(plain: Path) -> None:
    with pytest.raises(AttestationError, match="has no signature, but a public key was given"):
        verify_attestation(attest(plain), plain, PUBLIC)


def _set(path: str, value: Any) -> Any:
    def change(statement: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        at: Any = statement
        for part in parents:
            at = at[int(part)] if part.isdigit() else at[part]
        if value is KeyError:
            del at[int(last) if last.isdigit() else last]
        else:
            at[int(last) if last.isdigit() else last] = value

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_set("_type", "https://in-toto.io/Statement/v0.1"), "_type is .*v0.1', expected .*v1'"),
        (_set("predicateType", "urn:udsstream:selection-log-audit:v2"), "predicateType is .*v2', expected .*v1'"),
        (_set("subject", {}), "'subject' is {}, expected list"),
        (_set("subject.0", KeyError), "no subject 9f0e/run.json"),
        (_set("subject.1", KeyError), "names the checkpoint 'ba00000004', but no subject is of it"),
        (_set("subject.3", KeyError), "no subject 9f0e/end"),
        (_set("subject.0.name", "other/run.json"), "is not of run '9f0e'"),
        (_set("subject.1.name", "9f0e/_heads/ba00000008"), "subject '9f0e/_heads/ba00000008' twice"),
        (_set("subject.0.digest", {"sha512": "00"}), "'sha256' is None, expected str"),
        (_set("subject.0.digest.sha256", "AB" * 32), "expected a SHA-256 of 64 hexadecimal digits"),
        (_set("subject.3.digest.sha256", "00" * 32), "9f0e/end has another digest than the chains"),
        (_set("predicate.checkpoints.0", KeyError), "9f0e/_heads/ba00000004 is not spoken of in the predicate"),
        (_set("predicate.checkpoints.0.step", 5), "'ba00000004' of the predicate is not of the step 5"),
        (_set("predicate.checkpoints.0.name", "../../x"), "is not of the step 4"),
        (_set("predicate.checkpoints.0.attempt", True), "'attempt' is True, expected int"),
        (lambda statement: statement["predicate"]["end"].append(statement["predicate"]["end"][0]), "has a rank twice"),
        (_set("predicate.end.0.rank", -1), "'rank' is -1, expected a count"),
        (_set("predicate.end.0.selection", None), "'selection' is None, expected dict"),
        (_set("predicate.madeAt", "yesterday"), "'madeAt' is 'yesterday', expected a time"),
        (_set("predicate.audit.verdict", "fine\x1b[2J"), "'verdict' is"),
        (_set("predicate.run", KeyError), "'run' is None, expected dict"),
        (_set("predicate", []), r"'predicate' is \[\], expected dict"),
    ],
)
def test_a_statement_that_contradicts_itself_is_refused(plain: Path, spoil: Any, message: str) -> None:
    statement = attest(plain)
    spoil(statement)
    with pytest.raises(AttestationError, match=message):
        verify_attestation(statement, plain)
    with pytest.raises(AttestationError, match=message):  # whoever signed it
        verify_attestation(sign(statement, PRIVATE), plain, PUBLIC)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is list, expected a Statement or a DSSE envelope"),
        (b'{"_type": NaN}', "NaN is not JSON"),
        (b'{"_type": 1, "_type": 2}', "'_type' stands twice"),
        (b"{}", "_type is None"),
        (b" " * ((16 << 20) + 1), "has 16,777,217 bytes; at most 16,777,216"),
    ],
)
def test_bytes_that_are_no_attestation_are_refused(plain: Path, data: bytes, message: str) -> None:
    with pytest.raises(AttestationError, match=message):
        verify_attestation(data, plain)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*at, key))


@pytest.mark.parametrize("signed", [False, True])
def test_nothing_in_an_attestation_crashes_the_reader(tmp_path: Path, signed: bool) -> None:
    root = uds_log.write(tmp_path / "a", steps=5, checkpoints=(4,))
    honest = sign(attest(root), PRIVATE) if signed else attest(root)
    for place in places(honest):
        for junk in (None, True, -1, 1 << 70, 1.5, "\x1b[2J", [], {}, [[]]):
            changed = {"": copy.deepcopy(honest)}
            at: Any = changed
            *parents, last = ("", *place)
            for part in parents:
                at = at[part]
            at[last] = junk
            for key in (None, PUBLIC) if signed else (None,):
                with contextlib.suppress(AttestationError):
                    verify_attestation(changed[""], root, key)


def test_a_file_that_is_none_or_huge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttestationError, match="there is no file"):
        read_attestation(tmp_path / "a.json")
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(AttestationError, match=r"the attestation cannot be read: .* has 1099511627776 bytes"):
        read_attestation(tmp_path / "a.json")
    with pytest.raises(AttestationError, match="not a regular file"):
        read_attestation(tmp_path)


def test_every_changed_byte_of_a_signed_attestation_is_noticed(envelope: dict[str, Any], plain: Path) -> None:
    data = serialize(envelope)
    for at in range(0, len(data), 97):
        changed = bytearray(data)
        changed[at] ^= 1
        try:
            check = verify_attestation(bytes(changed), plain, PUBLIC)
        except AttestationError:
            continue
        # Only what no signature covers may change: the hint which key it was.
        assert check.findings == ()
        keyid = data.index(b'"keyid":"') + len(b'"keyid"')
        assert keyid - 7 <= at <= keyid + 66


# -- the command -------------------------------------------------------------------------------------------------


def udsstream(*arguments: object, answer: str | None = None) -> Any:
    return CliRunner().invoke(app, ["audit", *map(str, arguments)], input=answer, env={"COLUMNS": "200"})


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    (tmp_path / "key.pem").write_bytes(PRIVATE)
    (tmp_path / "locked.pem").write_bytes(pem(KEY, b"secret"))
    (tmp_path / "pub.pem").write_bytes(PUBLIC)
    (tmp_path / "other.pem").write_bytes(public_pem(OTHER))
    return tmp_path


@pytest.fixture
def audited(tmp_path: Path) -> Path:
    """A log in which an audit finds nothing."""
    NumpyRun(tmp_path / "audited").begin().steps(0, 8).checkpoint(8).steps(8, 12).close()
    return tmp_path / "audited"


def test_attest_and_verify_from_the_command_line(audited: Path, keys: Path) -> None:
    out = keys / "a.json"
    done = udsstream(audited, "--attest", out, "--key", keys / "key.pem")
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    assert f"Attested in {out}, signed with key {dsse.key_id(KEY.public_key())}." in done.stdout
    assert out.read_bytes().endswith(b"}\n")
    done = udsstream(audited, "--verify-attestation", out, "--public-key", keys / "pub.pem")
    assert done.exit_code == 0, done.output
    assert "Verdict: the log holds unchanged what was attested" in done.stdout
    done = udsstream(audited, "--verify-attestation", out, "--json")
    assert json.loads(done.stdout)["signature"] == "not checked"
    done = udsstream(audited, "--verify-attestation", out, "--public-key", keys / "other.pem")
    assert done.exit_code == 2
    assert "AttestationError: signed by another key" in done.stderr
    done = udsstream(audited, "--verify-attestation", out, "--public-key", keys / "other.pem", "--json")
    assert json.loads(done.stdout)["exit_code"] == 2
    flip_segment(audited)
    done = udsstream(audited, "--verify-attestation", out, "--public-key", keys / "pub.pem")
    assert done.exit_code == 1
    assert "this is not a log that was attested as intact" in done.stdout


def test_an_encrypted_key_is_asked_for_before_the_audit(audited: Path, keys: Path) -> None:
    done = udsstream(audited, "--attest", keys / "a.json", "--key", keys / "locked.pem", "--json", answer="secret\n")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["attestation"]["keyid"] == dsse.key_id(KEY.public_key())
    done = udsstream(audited, "--attest", keys / "b.json", "--key", keys / "locked.pem", answer="wrong\n")
    assert (done.exit_code, done.stdout.strip()) == (2, "")
    assert "does not open the private key" in done.stderr
    assert not (keys / "b.json").exists()


def test_without_a_key_the_statement_is_bare(audited: Path, keys: Path) -> None:
    done = udsstream(audited, "--attest", keys / "a.json")
    assert "not signed" in done.stdout
    assert json.loads((keys / "a.json").read_bytes())["_type"] == "https://in-toto.io/Statement/v1"
    assert udsstream(audited, "--verify-attestation", keys / "a.json").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--key", "key.pem"], "only with --attest is anything signed"),
        (["--public-key", "pub.pem"], "it goes with --verify-attestation"),
        (["--verify-attestation", "a.json", "--data"], "verified instead of an audit"),
        (["--verify-attestation", "a.json", "--attest", "b.json"], "verified instead of an audit"),
        (["--attest", "key.pem"], "key.pem exists, and is not overwritten"),
        (["--attest", "a.json", "--key", "none.pem"], "the key cannot be read: there is no file none.pem"),
        (["--attest", "no/a.json"], "the attestation cannot be written to no/a.json"),
        (["--verify-attestation", "a.json"], "the attestation cannot be read: there is no file a.json"),
        (["--verify-attestation", "key.pem"], "the attestation is not JSON"),
    ],
)
def test_what_cannot_be_done_is_said(
    audited: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(keys)
    done = udsstream(audited, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr


def test_the_documented_example_runs(audited: Path, keys: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "attestation.md").read_text()
    (keys / "runs").mkdir()
    audited.rename(keys / "runs" / "a")
    (example,) = re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], cwd=keys, capture_output=True, text=True)
    assert done.stderr == ""
    assert "holds unchanged what was attested" in done.stdout
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl on this machine for the documented commands")
    for name in ("a.json", "key.pem", "pub.pem"):
        (keys / name).unlink()
    (block,) = re.findall(r"```bash\n(.*?)```", document, flags=re.DOTALL)
    lines = [line.split("#")[0].split() for line in block.splitlines() if line]
    assert [command for command, *_ in lines] == ["openssl", "openssl", "udsstream", "udsstream"]
    for command, *arguments in lines:
        start = (
            [sys.executable, "-c", "from udsstream.cli import main; main()"] if command == "udsstream" else [command]
        )
        done = subprocess.run([*start, *arguments], cwd=keys, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# -- keys and the standard ---------------------------------------------------------------------------------------


def test_pae_is_that_of_the_specification() -> None:
    found = dsse.pae("http://example.com/HelloWorld", b"hello world")
    assert found == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert dsse.pae("é", b"") == b"DSSEv1 2 \xc3\xa9 0 "


def test_the_keyid_is_that_of_the_der_key() -> None:
    der = base64.b64decode(b"".join(PUBLIC.splitlines()[1:-1]))
    assert dsse.key_id(KEY.public_key()) == hashlib.sha256(der).hexdigest()


def test_an_encrypted_key_needs_its_passphrase(plain: Path) -> None:
    encrypted = pem(KEY, b"secret")
    asked = []

    def ask() -> bytes:
        asked.append(1)
        return b"secret"

    expected = sign(attest(plain), PRIVATE)
    assert sign(attest(plain), encrypted, passphrase=b"secret") == expected
    assert sign(attest(plain), encrypted, passphrase=ask) == expected
    assert sign(attest(plain), PRIVATE, passphrase=ask) == expected
    assert asked == [1]  # not for the key that needs none
    with pytest.raises(AttestationError, match="is encrypted: give its passphrase"):
        sign(attest(plain), encrypted)
    with pytest.raises(AttestationError, match="does not open the private key"):
        sign(attest(plain), encrypted, passphrase=b"wrong")


def test_keys_of_another_kind_are_named(envelope: dict[str, Any], plain: Path) -> None:
    curve = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(AttestationError, match=r"private key is EllipticCurve|private key is EC"):
        sign(attest(plain), pem(curve))
    with pytest.raises(AttestationError, match="expected Ed25519"):
        verify_attestation(envelope, plain, public_pem(curve))
    with pytest.raises(AttestationError, match="it is a private key"):
        verify_attestation(envelope, plain, PRIVATE)
    for nonsense in (b"", b"nonsense", PUBLIC[:60]):
        with pytest.raises(AttestationError, match="public key cannot be read"):
            verify_attestation(envelope, plain, nonsense)
        with pytest.raises(AttestationError, match="private key cannot be read"):
            sign(attest(plain), nonsense)
    with pytest.raises(AttestationError, match="private key cannot be read"):
        sign(attest(plain), PUBLIC)


def test_openssl_agrees(envelope: dict[str, Any], tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl on this machine")
    (tmp_path / "pub.pem").write_bytes(PUBLIC)
    (tmp_path / "signed").write_bytes(dsse.pae(PAYLOAD_TYPE, base64.b64decode(envelope["payload"])))
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["pkeyutl", "-verify", "-pubin", "-inkey", "pub.pem", "-rawin", "-in", "signed", "-sigfile", "sig"]
    done = subprocess.run([openssl, *command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "Signature Verified Successfully")


def test_without_the_package_the_error_names_the_extra(plain: Path, tmp_path: Path) -> None:
    statement, unsigned = tmp_path / "s.json", tmp_path / "code.py"
    statement.write_bytes(serialize(attest(plain)))
    unsigned.write_text(
        "import sys; from pathlib import Path\n"
        "sys.modules['cryptography'] = None\n"
        "from udsstream.audit import attestation\n"
        "from udsstream.errors import AttestationError\n"
        f"data = attestation.read_attestation(Path({str(statement)!r}))\n"
        f"assert attestation.verify_attestation(data, Path({str(plain)!r})).signature == 'none'\n"
        "try:\n"
        "    attestation.sign({}, b'')\n"
        "except AttestationError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, str(unsigned)], capture_output=True, text=True, check=True)
    assert "pip install 'udsstream[attest]'" in done.stdout


def test_making_it_changes_nothing(plain: Path) -> None:
    before = {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()}
    statement = attest(plain)
    copied = copy.deepcopy(statement)
    verify_attestation(sign(statement, PRIVATE), plain, PUBLIC)
    assert statement == copied
    assert {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()} == before
