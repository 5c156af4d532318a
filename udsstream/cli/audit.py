"""`udsstream audit`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from udsstream.cli.options import complaint, stream_places

__all__ = ["audit"]

_UNREADABLE = 2


def audit(
    run: Annotated[Path, typer.Argument(help="A run's log folder.")],
    data: Annotated[bool, typer.Option("--data", help="Also check the streams' shards against their digests.")] = False,
    stream: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Where a stream is now (with --data; repeatable)."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A Composer checkpoint of the run: the log is compared with it.")
    ] = None,
    anchor: Annotated[
        str | None, typer.Option(metavar="STEP:HEXROOT", help="A Merkle root that was kept elsewhere.")
    ] = None,
    attest: Annotated[
        Path | None,
        typer.Option(metavar="OUT.json", help="Write what was found as an in-toto attestation (docs/attestation.md)."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="KEY.pem", help="With --attest: sign it with this Ed25519 private key.")
    ] = None,
    verify_attestation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instead of an audit: does the log still hold what this attestation says?"),
    ] = None,
    public_key: Annotated[
        Path | None,
        typer.Option(metavar="PUB.pem", help="With --verify-attestation: the key that must have signed it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Re-derive every decision from the log, without the scoring code.

    Exit code 0: nothing was found. 1: something was. 2: the log, or an attestation, cannot be read or trusted.

    Example: udsstream audit runs/a --data --checkpoint runs/a/checkpoints/latest-rank0.pt
    """
    from udsstream.errors import UdsstreamError

    places = stream_places(stream)
    if places and not data:
        raise typer.BadParameter("only with --data are streams looked at", param_hint="--stream")
    kept = None if anchor is None else _anchor(anchor)
    if key is not None and attest is None:
        raise typer.BadParameter("only with --attest is anything signed", param_hint="--key")
    if public_key is not None and verify_attestation is None:
        raise typer.BadParameter("it goes with --verify-attestation", param_hint="--public-key")
    if verify_attestation is not None and (data or checkpoint or anchor or attest):
        raise typer.BadParameter(
            "an attestation is verified instead of an audit: leave out --data, --checkpoint, --anchor and --attest",
            param_hint="--verify-attestation",
        )
    if attest is not None and attest.exists():
        raise typer.BadParameter(f"{attest} exists, and is not overwritten", param_hint="--attest")
    try:
        if verify_attestation is not None:
            found, text = _verify(run, verify_attestation, public_key)
        else:
            found, text = _audit(
                run, data=data, streams=places, checkpoint=checkpoint, anchor=kept, attest=attest, key=key
            )
    except UdsstreamError as error:
        if as_json:
            print(json.dumps({"error": f"{type(error).__name__}: {error}", "exit_code": _UNREADABLE}, indent=2))
        else:
            typer.echo(complaint(error), err=True)
        raise typer.Exit(_UNREADABLE) from error
    print(json.dumps(found, indent=2) if as_json else text)
    raise typer.Exit(found["exit_code"])


def _audit(run: Path, *, attest: Path | None, key: Path | None, **given: Any) -> tuple[dict[str, Any], str]:
    """The report as JSON and as text; the attestation is written on the way."""
    from udsstream.audit.report import render
    from udsstream.audit.run import audit as run_audit

    if attest is None:
        report = run_audit(run, **given)
        return report.as_dict(), render(report, str(run))
    from udsstream.audit import attestation

    # The key first: an audit may take long, and a passphrase is better asked for at once.
    signer = None if key is None else attestation.Signer.read(key, ask=_passphrase)
    report = run_audit(run, **given)
    statement = attestation.make_statement(run, report)
    attestation.write_attestation(attest, statement if signer is None else signer.sign(statement))
    keyid = None if signer is None else signer.keyid
    made = f"signed with key {keyid}" if keyid else "not signed: who made it cannot be told from it"
    return (
        report.as_dict() | {"attestation": {"file": str(attest), "keyid": keyid}},
        f"{render(report, str(run))}\nAttested in {attest}, {made}.",
    )


def _verify(run: Path, file: Path, public_key: Path | None) -> tuple[dict[str, Any], str]:
    """What became of an attestation, as JSON and as text."""
    from udsstream.audit import attestation

    trusted = None if public_key is None else attestation.read_key(public_key)
    check = attestation.verify_attestation(attestation.read_attestation(file), run, trusted)
    return check.as_dict(), attestation.render(check, str(file))


def _passphrase() -> bytes:
    return typer.prompt("Passphrase of the private key", hide_input=True, err=True).encode()


def _anchor(text: str) -> tuple[int, bytes]:
    match = re.fullmatch(r"([0-9]{1,18}):([0-9a-fA-F]{64})", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not STEP:HEXROOT, such as 120:5fe1… (64 digits)", param_hint="--anchor")
    return int(match[1]), bytes.fromhex(match[2])
