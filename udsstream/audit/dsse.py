"""DSSE v1 envelopes (https://github.com/secure-systems-lab/dsse) signed with Ed25519, and nothing of what is in them.

    PAE(type, body) = "DSSEv1" SP len(type) SP type SP len(body) SP body
    signature       = Ed25519(private key, PAE(payloadType, payload))
    keyid           = SHA-256, in hexadecimal, of the public key's DER SubjectPublicKeyInfo

A keyid is a hint and no evidence: every signature is tried with the key that the user trusts. Needs the extra `attest` (the package
cryptography), which is imported at the first use of a key. Whose key it is, and whether it was revoked, is not known here.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from udsstream.errors import AttestationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["Passphrase", "key_id", "pae", "private_key", "public_key", "seal", "signed_by", "unpack", "verify"]

Passphrase = bytes | Callable[[], bytes] | None
"""Of an encrypted key, or who to ask for it: called only when the key is encrypted."""

_SIGNATURES_AT_MOST = 64


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed: type and payload, each with its length, so that neither can be taken for part of the other."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


# -- keys --------------------------------------------------------------------------------------------------------


def private_key(pem: bytes, passphrase: Passphrase = None) -> Ed25519PrivateKey:
    """The Ed25519 private key in a PEM file.

    Raises:
        AttestationError: it is none, is encrypted and no passphrase was given, or the passphrase is wrong.
    """
    ed25519, serialization = _cryptography()
    try:
        key = serialization.load_pem_private_key(pem, None)
    except TypeError:
        if passphrase is None:
            raise AttestationError("the private key is encrypted: give its passphrase") from None
        given = passphrase() if callable(passphrase) else passphrase
        try:
            key = serialization.load_pem_private_key(pem, given)
        except (ValueError, TypeError) as error:
            raise AttestationError("the passphrase does not open the private key") from error
    except Exception as error:  # ValueError, UnsupportedAlgorithm
        raise AttestationError(
            f"the private key cannot be read: {error}; expected PEM, such as {_MAKE_A_KEY} writes"
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise AttestationError(f"the private key is {_kind(key)}, expected Ed25519: make one with {_MAKE_A_KEY}")
    return key


def public_key(pem: bytes) -> Ed25519PublicKey:
    """The Ed25519 public key in a PEM file.

    Raises:
        AttestationError: it is none; a private key is not taken in its place, for whoever only verifies should not have it.
    """
    ed25519, serialization = _cryptography()
    try:
        key = serialization.load_pem_public_key(pem)
    except Exception as error:  # ValueError, UnsupportedAlgorithm
        what = "it is a private key" if b"PRIVATE KEY" in pem else str(error)
        raise AttestationError(
            f"the public key cannot be read: {what}; expected PEM, such as `openssl pkey -in key.pem -pubout` writes"
        ) from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise AttestationError(f"the public key is {_kind(key)}, expected Ed25519")
    return key


_MAKE_A_KEY = "`openssl genpkey -algorithm ed25519 -out key.pem`"


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256, in hexadecimal, of the DER SubjectPublicKeyInfo."""
    _, serialization = _cryptography()
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise AttestationError(
            "signatures need the package cryptography, which is not installed: pip install 'udsstream[attest]'"
        ) from error
    return ed25519, serialization


def _kind(key: object) -> str:
    return type(key).__name__.lstrip("_").removesuffix("PrivateKey").removesuffix("PublicKey")


# -- envelopes ---------------------------------------------------------------------------------------------------


def seal(payload_type: str, payload: bytes, key: Ed25519PrivateKey) -> dict[str, Any]:
    """The envelope of a payload with one signature."""
    return {
        "payloadType": payload_type,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [
            {
                "keyid": key_id(key.public_key()),
                "sig": base64.b64encode(key.sign(pae(payload_type, payload))).decode(),
            }
        ],
    }


def unpack(envelope: Mapping[str, Any], payload_type: str) -> bytes:
    """The payload, and a check of the envelope's form: nothing is said of who signed it.

    Raises:
        AttestationError: the type is another, the payload is not base64, or the signatures are missing, doubled or misshapen.
    """
    found = envelope.get("payloadType")
    if found != payload_type:
        raise AttestationError(
            f"the envelope's payloadType is {found!r:.80}, expected {payload_type!r}: it is signed as something else"
        )
    signatures = _signatures(envelope)
    for what, values in (
        ("signature", [sig for _, sig in signatures]),
        ("keyid", [keyid for keyid, _ in signatures if keyid]),
    ):
        if len(set(values)) != len(values):
            raise AttestationError(f"the envelope has the same {what} twice: signatures must be of different keys")
    return _base64(envelope.get("payload"), "payload")


def signed_by(envelope: Mapping[str, Any]) -> tuple[str, ...]:
    """The keyids that the envelope names: hints, which anybody may have written there."""
    return tuple(keyid for keyid, _ in _signatures(envelope) if keyid)


def verify(envelope: Mapping[str, Any], key: Ed25519PublicKey, payload_type: str) -> bytes:
    """The payload, which the holder of this key has signed as this type; other signatures are of no account.

    Raises:
        AttestationError: as `unpack`; or this key signed something else, or nothing.
    """
    from cryptography.exceptions import InvalidSignature

    payload = unpack(envelope, payload_type)
    signed = pae(payload_type, payload)
    for _, signature in _signatures(envelope):
        try:
            key.verify(signature, signed)
        except InvalidSignature:
            continue
        return payload
    trusted, named = key_id(key), signed_by(envelope)
    if trusted in named:
        raise AttestationError(
            f"the signature of key {trusted} does not fit the payload: one of them was changed after signing. Do not trust it."
        )
    others = ", ".join(named) if named else "a key that it does not name"
    raise AttestationError(f"signed by another key: by {others}, not by {trusted}, the one that was given")


def _signatures(envelope: Mapping[str, Any]) -> list[tuple[str | None, bytes]]:
    """(keyid, signature) of each."""
    found = envelope.get("signatures")
    if not isinstance(found, list) or not found:
        raise AttestationError("the envelope has no signature: expected a list of at least one under 'signatures'")
    if len(found) > _SIGNATURES_AT_MOST:
        raise AttestationError(f"the envelope has {len(found)} signatures, at most {_SIGNATURES_AT_MOST} are looked at")
    out = []
    for number, entry in enumerate(found, 1):
        keyid = entry.get("keyid") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not (keyid is None or (isinstance(keyid, str) and keyid.isprintable())):
            raise AttestationError(f"signature {number} of the envelope is not an object with 'keyid' and 'sig'")
        out.append((keyid, _base64(entry.get("sig"), f"signature {number}")))
    return out


def _base64(text: object, what: str) -> bytes:
    """Standard or URL-safe base64, as DSSE demands of a verifier, but each byte string in one spelling only."""
    if not isinstance(text, str):
        raise AttestationError(f"the envelope's {what} is {type(text).__name__}, expected base64 text")
    safe = "-" in text or "_" in text
    try:
        data = base64.b64decode(text.encode("ascii"), altchars=b"-_" if safe else None, validate=True)
    except (binascii.Error, ValueError) as error:
        raise AttestationError(f"the envelope's {what} is not base64: {error}") from error
    again = base64.urlsafe_b64encode(data) if safe else base64.b64encode(data)
    if again.decode() != text:
        raise AttestationError(
            f"the envelope's {what} is not canonical base64: whoever encodes the same bytes spells them in another way"
        )
    return data
