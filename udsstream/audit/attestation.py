"""What an audit found, as an in-toto Statement v1 that can be signed, kept elsewhere, and later held against the log.

    Statement   https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
    subjects    run.json, each checkpoint's heads, and the log's end (docs/attestation.md says what each digest is of)
    predicate   what the run is, what was covered, and the audit's verdict with what it did and did not check
    envelope    DSSE with Ed25519 (`dsse.py`), if a key is given; a bare Statement proves nothing of its maker

An attestation is an anchor: whoever keeps it finds out when the log is cut or rewritten afterwards. It says that this audit saw this log,
not that what the log says is true, and nothing of what was logged after it was made.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from udsstream.audit import dsse
from udsstream.errors import AttestationError, LogCorruptError, LogError
from udsstream.selection_log import layout
from udsstream.selection_log.checkpoints import heads_files, read_heads
from udsstream.selection_log.digest import merkle_root, rank_head
from udsstream.selection_log.files import read_small
from udsstream.selection_log.manifest import canonical_json
from udsstream.selection_log.run_file import RunFile, read_run
from udsstream.selection_log.schema import SELECTION, TABLES
from udsstream.selection_log.state import read_state
from udsstream.selection_log.verification import Examination, Fault, examine
from udsstream.untrusted_text import clean_line

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from udsstream.audit.report import AuditReport

__all__ = [
    "PAYLOAD_TYPE",
    "PREDICATE_TYPE",
    "STATEMENT_TYPE",
    "AttestationCheck",
    "Signer",
    "SubjectCheck",
    "make_statement",
    "read_attestation",
    "read_key",
    "render",
    "serialize",
    "sign",
    "verify_attestation",
    "write_attestation",
]

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATE_TYPE = "urn:udsstream:selection-log-audit:v1"
"""Names the predicate's form; its last part is the version. It does not resolve: docs/attestation.md is the description."""

SIZE_LIMIT = 16 << 20
"""Bytes of an attestation; each checkpoint takes about 400."""

_KEY_LIMIT = 1 << 20

_CHECKPOINT = re.compile(r"_heads/(ba(\d{8,})(?:-a\d+)?)")


# -- making ------------------------------------------------------------------------------------------------------


def make_statement(root: Path, report: AuditReport, *, made_at: datetime.datetime | None = None) -> dict[str, Any]:
    """The Statement of an audit of the log in a folder.

    Args:
        report: what the audit of this folder gave. Findings are no hindrance: they are stated.
        made_at: now, unless given.

    Raises:
        AttestationError: the report is of another run, or the log has gone on since: its later steps were not audited.
        LogError: the log's heads, manifests or run.json cannot be read.
    """
    file = read_run(root)
    run_id = _run_id(file)
    if report.run_id != run_id:
        raise AttestationError(f"the audit is of run {report.run_id}, but {root} holds run {run_id}")
    kept = [(path, read_heads(path)) for path in heads_files(root)]
    end = _end(root, file)
    for place in end:
        for table in TABLES:
            audited = report.chains.get((table, place["rank"]))
            if audited is not None and audited != place[table]["chain"]:
                raise AttestationError(
                    f"{root} has gone on since it was audited: rank {place['rank']}'s {table} now ends before step "
                    f"{place[table]['step']}, behind what the audit saw. Audit again; while a run goes on, that may take several tries"
                )
    subjects = [
        _subject(f"{run_id}/run.json", file.sha256),
        *(_subject(f"{run_id}/_heads/{path.stem}", heads.root) for path, heads in kept),
        _subject(f"{run_id}/end", _end_root(end)),
    ]
    now = made_at or datetime.datetime.now(datetime.timezone.utc)
    audit = report.as_dict()
    predicate = {
        "madeAt": now.astimezone(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "madeBy": {"udsstream": metadata.version("udsstream")},
        **_stated(file),
        "covered": {"steps": report.steps, "rows": report.rows, "attempts": report.attempts},
        "checkpoints": [
            {"name": path.stem, "step": heads.step, "attempt": heads.attempt, "bufferSha256": heads.buffer_sha256}
            for path, heads in kept
        ],
        "end": end,
        "audit": {
            "verdict": audit["verdict"],
            "exitCode": audit["exit_code"],
            "found": audit["found"],
            "anchor": audit["anchor"],
            "checked": audit["checked"],
            "unchecked": audit["unchecked"],
        },
    }
    return {"_type": STATEMENT_TYPE, "subject": subjects, "predicateType": PREDICATE_TYPE, "predicate": predicate}


def serialize(attestation: Mapping[str, Any]) -> bytes:
    """A Statement or an envelope as canonical JSON (keys sorted, no spaces, ASCII): equal content gives equal bytes."""
    return canonical_json(attestation)


def sign(statement: Mapping[str, Any], private_key_pem: bytes, *, passphrase: dsse.Passphrase = None) -> dict[str, Any]:
    """The Statement in a DSSE envelope, signed with an Ed25519 key.

    Raises:
        AttestationError: the key cannot be used, or the package cryptography is not installed.
    """
    return Signer(dsse.private_key(private_key_pem, passphrase)).sign(statement)


class Signer:
    """A private key that was read, and its passphrase asked for, before there is anything to sign."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.keyid = dsse.key_id(key.public_key())

    @classmethod
    def read(cls, path: Path, *, ask: Callable[[], bytes]) -> Signer:
        """The key in a PEM file; `ask` is called for a passphrase if it is encrypted."""
        return cls(dsse.private_key(read_key(path), ask))

    def sign(self, statement: Mapping[str, Any]) -> dict[str, Any]:
        """As the function of this name."""
        return dsse.seal(PAYLOAD_TYPE, serialize(statement), self._key)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _subject(name: str, digest: bytes) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": digest.hex()}}


def _run_id(file: RunFile) -> str:
    return str(file.run.get("run_id", "unknown"))


def _stated(file: RunFile) -> dict[str, Any]:
    """What the predicate repeats of run.json, so that it can be read without the log. It must agree with run.json when verified."""
    run = file.run
    return {
        "run": {"id": _run_id(file), "createdAt": run.get("created"), "worldSize": file.settings.world_size},
        "streams": [
            {"name": stream.get("name"), "samples": stream.get("samples"), "indexSha256": stream.get("index_sha256")}
            for stream in _list(run.get("streams"))
            if isinstance(stream, dict)
        ],
        "selection": run.get("selection"),
        "selectionFingerprint": run.get("selection_fingerprint"),
        "versions": run.get("versions"),
    }


def _end(root: Path, file: RunFile) -> list[dict[str, Any]]:
    """For each rank and table the newest attempt, the step after the last that it logged, and the chain there."""
    end = []
    for rank in layout.ranks(root):
        place: dict[str, Any] = {"rank": rank}
        for table in TABLES:
            state = read_state(root, rank, file.settings.codec(table), file.sha256)
            line = state.manifest.last_attempt
            if line is None:
                raise LogCorruptError(
                    f"rank {rank} of {root} has no attempt in the manifest of {table!r}: it was cut, or the run was killed before it began"
                )
            steps = [segment.last_step for segment in state.manifest.segments if segment.attempt == line.attempt]
            steps += [int(scan.steps[-1]) for scan in state.wals if scan.batches]
            after = max([line.from_step, *(step + 1 for step in steps)])
            place[table] = {"attempt": line.attempt, "step": after, "chain": state.head.hex()}
        end.append(place)
    return end


def _end_root(end: list[dict[str, Any]]) -> bytes:
    """Merkle root over the ranks' heads, as at a checkpoint."""
    return merkle_root([rank_head(*(bytes.fromhex(place[table]["chain"]) for table in TABLES)) for place in end])


# -- verifying ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SubjectCheck:
    """One subject of an attestation against the log."""

    name: str
    attested: str
    """SHA-256, in hexadecimal."""
    found: str | None
    """What the log has now; None when it has no such thing."""

    @property
    def holds(self) -> bool:
        return self.attested == self.found


@dataclass(frozen=True, kw_only=True)
class AttestationCheck:
    """What became of an attestation that was held against a log."""

    run_id: str
    made_at: str
    until: int
    """It speaks of the steps below this one."""
    attested_verdict: str
    """The verdict of the audit that it tells of."""
    signature: Literal["verified", "not checked", "none"]
    """`verified` with the key that was given; `not checked`: it is signed, but no key was given; `none`: it is not signed."""
    keyids: tuple[str, ...]
    """The key that verified it; for `not checked` those that it names."""
    subjects: tuple[SubjectCheck, ...]
    findings: tuple[str, ...]
    """What does not agree; empty when all does."""
    checked: tuple[str, ...]
    unchecked: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0: everything agrees; 1: something does not."""
        return 1 if self.findings else 0

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.findings:
            count = len(self.findings)
            return f"{count:,} finding{'s' if count > 1 else ''}: this is not a log that was attested as intact"
        who = {
            "verified": f"by the holder of key {', '.join(self.keyids)}",
            "not checked": "by whom was not checked, for no public key was given",
            "none": "by whom cannot be told, for it is not signed",
        }[self.signature]
        return f"the log holds unchanged what was attested on {self.made_at}, the steps below {self.until}, {who}"

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return asdict(self) | {
            "subjects": [asdict(subject) | {"holds": subject.holds} for subject in self.subjects],
            "verdict": self.verdict,
            "exit_code": self.exit_code,
        }


def read_attestation(path: Path) -> bytes:
    """The bytes of an attestation's file.

    Raises:
        AttestationError: there is none, or it is too large to be one.
    """
    return _read(path, "attestation", SIZE_LIMIT)


def read_key(path: Path) -> bytes:
    """The bytes of a key's file; AttestationError as for an attestation."""
    return _read(path, "key", _KEY_LIMIT)


def _read(path: Path, what: str, limit: int) -> bytes:
    try:
        return read_small(path, limit)
    except FileNotFoundError as error:
        raise AttestationError(f"the {what} cannot be read: there is no file {path}") from error
    except LogError as error:
        raise AttestationError(f"the {what} cannot be read: {error}") from error


def write_attestation(path: Path, attestation: Mapping[str, Any]) -> None:
    """Puts a Statement or an envelope into a new file.

    Raises:
        AttestationError: there is such a file already, or it cannot be written.
    """
    try:
        with path.open("xb") as file:
            file.write(serialize(attestation) + b"\n")
    except FileExistsError as error:
        raise AttestationError(f"{path} exists: an attestation is not overwritten; name another file") from error
    except OSError as error:
        raise AttestationError(f"the attestation cannot be written to {path}: {error.strerror or error}") from error


def verify_attestation(
    attestation: Mapping[str, Any] | bytes, root: Path, public_key_pem: bytes | None = None
) -> AttestationCheck:
    """Holds an attestation, a Statement or a signed envelope, against the log in a folder.

    The log's digests are recomputed from its rows, with the newest attested checkpoint as the anchor. What was logged after the attestation
    was made is neither its matter nor a finding.

    Args:
        public_key_pem: the Ed25519 key that must have signed it. None: who made it is not checked, and the result says so.

    Raises:
        AttestationError: it cannot be read, contradicts itself, or was not signed by this key.
        LogError: there is no log in the folder.
    """
    statement, signature, keyids = _open(attestation, public_key_pem)
    claims = _Claims.of(statement)
    file = read_run(root)
    checked = [f"the signature of key {keyids[0]}"] if signature == "verified" else []
    unchecked = {
        "verified": f"whose key {', '.join(keyids)} is",
        "not checked": f"the signature, which names {', '.join(keyids) or 'no key'}: no public key was given",
        "none": "who made the attestation: it is not signed, and whoever changed the log could have made it",
    }
    notes = [unchecked[signature]]
    findings: list[str] = []
    if claims.audit_exit_code != 0:
        findings.append(f"the audit that was attested had findings itself: {claims.audit_verdict}")
    subjects = [SubjectCheck(name=claims.name("run.json"), attested=claims.run_json, found=file.sha256.hex())]
    if not subjects[0].holds:
        findings.append(
            f"{layout.run_path(root)}: its SHA-256 is {file.sha256.hex()}, but {claims.run_json} was attested: it was changed, or it is "
            "another run's"
        )
    if claims.run_id != _run_id(file):
        findings.append(f"the attestation is of run {claims.run_id}, but {root} holds run {_run_id(file)}")
        notes.append("the rows and heads: they are of another run")
    else:
        if claims.stated != _stated(file):
            findings.append("what the attestation says of the run, its streams and settings is not what run.json says")
        checked.append("run.json against its digest, and what the attestation repeats of it")
        subjects += _check_log(root, file, claims, findings, checked, notes)
    notes.append(
        "whether what the log says is true: this compares digests; `udsstream audit` derives the decisions again"
    )
    return AttestationCheck(
        run_id=claims.run_id,
        made_at=claims.made_at,
        until=claims.until(),
        attested_verdict=claims.audit_verdict,
        signature=signature,
        keyids=keyids,
        subjects=tuple(subjects),
        findings=tuple(dict.fromkeys(findings)),
        checked=tuple(checked),
        unchecked=tuple(notes),
    )


def _check_log(
    root: Path, file: RunFile, claims: _Claims, findings: list[str], checked: list[str], unchecked: list[str]
) -> list[SubjectCheck]:
    """The chains, the checkpoints and the end; adds to the three lists."""
    faults: list[Fault] = []
    seen = examine(
        root,
        file.settings,
        # As attested: if run.json was changed since, the rows are still checked against what it was.
        bytes.fromhex(claims.run_json),
        report=faults.append,
        anchor=claims.anchor(),
        points_at=sorted({place[table]["step"] for place in claims.end for table in TABLES}),
    )
    findings += [fault.message for fault in faults]
    subjects = _check_heads(seen, claims, findings)
    subjects.append(_check_end(seen, claims, file.settings.world_size, findings))
    rows = seen.summary.rows
    if rows < claims.rows:
        findings.append(f"{claims.rows:,} decisions were attested, but the log has {rows:,}: it was cut")
    checked += [
        f"the chains of all {rows:,} decisions, recomputed from the rows",
        f"the Merkle roots of {len(claims.checkpoints):,} checkpoints, and of the log's end when it was attested",
    ]
    unchecked += [note for note in seen.summary.unchecked if not note.startswith("no head from outside")]
    newest = max((line.attempt for line in seen.attempts), default=0)
    if rows > claims.rows or any(place[SELECTION]["attempt"] < newest for place in claims.end):
        unchecked.append("what was logged after the attestation was made")
    return subjects


def render(check: AttestationCheck, title: str) -> str:
    """The check as text: what was found, what was and was not checked, the verdict last."""
    lines = [f"{title}: attestation of run {check.run_id}, made on {check.made_at}", ""]
    lines += [f"It says: {check.attested_verdict}.", ""]
    if check.findings:
        lines += ["Found", *(f"  ✗ {finding}" for finding in check.findings), ""]
    lines += ["Checked", *(f"  · {sentence}" for sentence in check.checked), ""]
    lines += ["Not checked", *(f"  · {sentence}" for sentence in check.unchecked), ""]
    return "\n".join(map(clean_line, [*lines, f"Verdict: {check.verdict}."]))


def _check_heads(seen: Examination, claims: _Claims, findings: list[str]) -> list[SubjectCheck]:
    out = []
    for place in claims.checkpoints:
        # By step and attempt, not by name: a later attempt at the same step moves the file aside.
        heads = next((h for h in seen.heads if (h.step, h.attempt) == (place["step"], place["attempt"])), None)
        name = claims.name(f"_heads/{place['name']}")
        check = SubjectCheck(name=name, attested=place["root"], found=None if heads is None else heads.root.hex())
        out.append(check)
        where = f"the checkpoint before step {place['step']} (attempt {place['attempt']})"
        if heads is None:
            findings.append(
                f"the log has no heads of {where}, which was attested: it was cut, or its heads file was removed"
            )
        elif not check.holds:
            findings.append(
                f"{where}: the Merkle root is {check.found}, but {check.attested} was attested: the log was rewritten"
            )
        elif heads.buffer_sha256 != place["bufferSha256"]:
            findings.append(
                f"{where}: the memory's vectors have the SHA-256 {heads.buffer_sha256}, but {place['bufferSha256']} was attested"
            )
    return out


def _check_end(seen: Examination, claims: _Claims, world_size: int, findings: list[str]) -> SubjectCheck:
    reached = []
    for table, rank in seen.chains:
        if table == SELECTION and rank < world_size and rank not in {place["rank"] for place in claims.end}:
            findings.append(
                f"rank {rank}: the attestation says nothing of it, but the run began with {world_size} ranks"
            )
    for place in claims.end:
        now = {"rank": place["rank"]}
        for table in TABLES:
            attempt, step, chain = (place[table][name] for name in ("attempt", "step", "chain"))
            journal = seen.chains.get((table, place["rank"]))
            found = None if journal is None else journal.points.get((attempt, step))
            where = f"rank {place['rank']}, {table}, before step {step} of attempt {attempt}"
            if found is None:
                findings.append(
                    f"{where}: the chain does not reach the end that was attested: the log was cut or is damaged"
                )
                continue
            now[table] = {"chain": found.hex()}
            if found.hex() != chain:
                findings.append(
                    f"{where}: the chain is at {found.hex()}, but {chain} was attested: rows were changed or cut"
                )
        reached.append(now)
    complete = all(table in now for now in reached for table in TABLES)
    return SubjectCheck(
        name=claims.name("end"), attested=claims.end_root, found=_end_root(reached).hex() if complete else None
    )


# -- reading what others may have written ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Claims:
    """What a Statement claims, its form checked and its parts compared with each other."""

    run_id: str
    made_at: str
    audit_verdict: str
    audit_exit_code: int
    rows: int
    run_json: str
    checkpoints: list[dict[str, Any]]
    """Those of the predicate, each with the `root` of its subject."""
    end: list[dict[str, Any]]
    end_root: str
    stated: dict[str, Any]

    def name(self, part: str) -> str:
        return f"{self.run_id}/{part}"

    def until(self) -> int:
        """The step after the last that was attested."""
        return max((place[SELECTION]["step"] for place in self.end), default=0)

    def anchor(self) -> tuple[int, bytes] | None:
        """The newest attested checkpoint."""
        if not self.checkpoints:
            return None
        newest = max(self.checkpoints, key=lambda place: (place["attempt"], place["step"]))
        return newest["step"], bytes.fromhex(newest["root"])

    @classmethod
    def of(cls, statement: Any) -> _Claims:
        """Raises AttestationError, naming the field, when the Statement is not one that `make_statement` gives."""
        for name, expected in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
            if not isinstance(statement, dict) or statement.get(name) != expected:
                found = statement.get(name) if isinstance(statement, dict) else statement
                raise AttestationError(f"the Statement's {name} is {found!r:.80}, expected {expected!r}")
        predicate = _get(statement, "predicate", dict)
        run, covered, audit = (_get(predicate, name, dict) for name in ("run", "covered", "audit"))
        run_id = _get(run, "id", str)
        digests = _digests(_get(statement, "subject", list), run_id)
        checkpoints = []
        for place in _get(predicate, "checkpoints", list):
            name = _get(place, "name", str)
            match = _CHECKPOINT.fullmatch(f"_heads/{name}")
            if match is None or int(match[2]) != _count(place, "step"):
                raise AttestationError(
                    f"the checkpoint {name!r} of the predicate is not of the step {place.get('step')!r}"
                )
            if (root := digests.pop(f"_heads/{name}", None)) is None:
                raise AttestationError(f"the predicate names the checkpoint {name!r}, but no subject is of it")
            buffer = None if place.get("bufferSha256") is None else _sha256(place, "bufferSha256")
            attempt = _count(place, "attempt")
            checkpoints.append(
                {"name": name, "step": place["step"], "attempt": attempt, "root": root, "bufferSha256": buffer}
            )
        end: list[dict[str, Any]] = [
            {"rank": _count(place, "rank")}
            | {
                table: {
                    "attempt": _count(_get(place, table, dict), "attempt"),
                    "step": _count(place[table], "step"),
                    "chain": _sha256(place[table], "chain"),
                }
                for table in TABLES
            }
            for place in _get(predicate, "end", list)
        ]
        if len({place["rank"] for place in end}) != len(end):
            raise AttestationError("the predicate's end has a rank twice")
        end_root = _end_root(end).hex()
        for name, expected in (("run.json", None), ("end", end_root)):
            if name not in digests:
                raise AttestationError(f"the Statement has no subject {run_id}/{name}")
            if expected not in (None, digests[name]):
                raise AttestationError(
                    f"the subject {run_id}/{name} has another digest than the chains of the predicate give"
                )
        if more := sorted(set(digests) - {"run.json", "end"}):
            raise AttestationError(f"the subject {run_id}/{more[0]} is not spoken of in the predicate")
        return cls(
            run_id=run_id,
            made_at=_time(predicate, "madeAt"),
            audit_verdict=_get(audit, "verdict", str),
            audit_exit_code=_count(audit, "exitCode"),
            rows=_count(covered, "rows"),
            run_json=digests["run.json"],
            checkpoints=checkpoints,
            end=end,
            end_root=end_root,
            stated={
                name: predicate.get(name)
                for name in ("run", "streams", "selection", "selectionFingerprint", "versions")
            },
        )


def _digests(subjects: list[Any], run_id: str) -> dict[str, str]:
    """The part of each subject's name after the run's id → its SHA-256."""
    out: dict[str, str] = {}
    for subject in subjects:
        name, digest = _get(subject, "name", str), _get(subject, "digest", dict)
        part = name.removeprefix(f"{run_id}/")
        if part == name:
            raise AttestationError(f"the subject {name!r} is not of run {run_id!r}, which the predicate is about")
        if part in out:
            raise AttestationError(f"the Statement has the subject {name!r} twice")
        out[part] = _sha256(digest, "sha256")
    return out


def _open(
    attestation: Mapping[str, Any] | bytes, public_key_pem: bytes | None
) -> tuple[Any, Literal["verified", "not checked", "none"], tuple[str, ...]]:
    """The Statement, what is known of its signature, and the keyids."""
    value = _parse(attestation, "attestation") if isinstance(attestation, bytes) else attestation
    if not isinstance(value, Mapping):
        raise AttestationError(f"the attestation is {type(value).__name__}, expected a Statement or a DSSE envelope")
    if "payload" not in value and "payloadType" not in value and "signatures" not in value:
        if public_key_pem is not None:
            raise AttestationError(
                "the attestation has no signature, but a public key was given: it is a bare Statement, which anybody could have made"
            )
        return value, "none", ()
    if public_key_pem is None:
        return _parse(dsse.unpack(value, PAYLOAD_TYPE), "payload"), "not checked", dsse.signed_by(value)
    key = dsse.public_key(public_key_pem)
    return _parse(dsse.verify(value, key, PAYLOAD_TYPE), "payload"), "verified", (dsse.key_id(key),)


def _parse(data: bytes, what: str) -> Any:
    """JSON in which no name stands twice: two readers could take it for two different things."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
            raise ValueError(f"the name {twice!r} stands twice in one object")
        return out

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    if len(data) > SIZE_LIMIT:
        raise AttestationError(f"the {what} has {len(data):,} bytes; at most {SIZE_LIMIT:,} are read")
    try:
        return json.loads(data, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise AttestationError(
            f"the {what} is not JSON that udsstream writes: {error or 'nested too deeply'}"
        ) from error


def _get(container: Any, name: str, kind: type) -> Any:
    value = container.get(name) if isinstance(container, Mapping) else None
    # A text that goes to a terminal must not steer it.
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, str) and not value.isprintable()):
        raise AttestationError(f"the Statement's field {name!r} is {value!r:.80}, expected {kind.__name__}")
    return value


def _count(container: Any, name: str) -> int:
    value = _get(container, name, int)
    if not 0 <= value < 1 << 62:
        raise AttestationError(f"the Statement's field {name!r} is {value}, expected a count")
    return value


def _time(container: Any, name: str) -> str:
    value = _get(container, name, str)
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", value):
        raise AttestationError(
            f"the Statement's field {name!r} is {value!r:.80}, expected a time such as 2026-11-24T04:00:00Z"
        )
    return value


def _sha256(container: Any, name: str) -> str:
    value = _get(container, name, str)
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise AttestationError(
            f"the Statement's field {name!r} is {value!r:.80}, expected a SHA-256 of 64 hexadecimal digits"
        )
    return value
