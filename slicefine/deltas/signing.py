"""Ed25519 signatures of deltas, beside the file they sign; keys are PEM files.

What is signed is the delta's SHA-256, which covers every byte of its file, behind a line that says
so: the signature holds for
no other message.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

try:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )
except ImportError as error:
    raise ImportError(
        "signatures need cryptography: pip install 'slicefine[sign]'"
    ) from error

from slicefine import atomic
from slicefine.deltas.delta import FILE, DeltaError
from slicefine.deltas.format import delta_path, read_file

ALGORITHM = "Ed25519"
_RAW = serialization.Encoding.Raw, serialization.PublicFormat.Raw


class SignatureError(DeltaError):
    """A signature that is missing, damaged, or of another key."""


def new_key(path: str | os.PathLike[str], password: str | None = None) -> Path:
    """Write a private key to ``path``, readable by its owner alone, and its public key to
    ``path.pub``; returns the latter.

    password: encrypts the private key. Raises FileExistsError rather than replace a key.
    """
    key = Ed25519PrivateKey.generate()
    path = Path(path)
    public = path.with_name(path.name + ".pub")
    for taken in (path, public):
        if taken.exists():
            raise FileExistsError(
                f"{taken} exists; a key is never written over. Choose another name, or move it away"
            )
    pem, protection = serialization.Encoding.PEM, serialization.NoEncryption()
    if password:
        protection = serialization.BestAvailableEncryption(password.encode())
    # 0600 from the start: changed later, others could read the key for a moment. EXCL closes the
    # gap between the look above and now.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, protection))
    # the form that openssl reads, too
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    atomic.write_text(public, key.public_key().public_bytes(pem, spki).decode())
    return public


def key_id(public: Ed25519PublicKey) -> str:
    """The first 16 hex digits of the SHA-256 of the raw public key."""
    return hashlib.sha256(public.public_bytes(*_RAW)).hexdigest()[:16]


def signature_path(delta: str | os.PathLike[str]) -> Path:
    """Where the signatures of a delta (file or folder) stand."""
    path = Path(delta)
    path = path if path.suffix == ".safetensors" else path / FILE
    return path.with_name(path.name + ".sig")


def sign(
    delta: str | os.PathLike[str],
    key: str | os.PathLike[str],
    password: str | None = None,
    sha256: str | None = None,
) -> str:
    """Check a delta and add a signature beside it; one key signs once.

    Args:
        delta: its file or folder.
        key: PEM file of an Ed25519 private key.
        password: of the key.
        sha256: of the delta that was looked at (``Delta.sha256``); None: the file is read here.

    Returns:
        The key's id.

    Raises:
        SignatureError: the key is none.
        DeltaError: the delta is damaged.
    """
    private = _load_key(key, password)
    if sha256 is None:
        sha256 = str(read_file(delta_path(delta), None)[0]["file_sha256"])
    public = private.public_key()
    entry = {
        "algorithm": ALGORITHM,
        "delta_sha256": sha256,
        "key_id": key_id(public),
        "public_key": base64.b64encode(public.public_bytes(*_RAW)).decode(),
        "signature": base64.b64encode(private.sign(_message(sha256))).decode(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    path = signature_path(delta)
    others = (
        [e for e in read(delta) if e["key_id"] != entry["key_id"]] if path.is_file() else []
    )
    atomic.write_text(path, json.dumps({"signatures": [*others, entry]}, indent=2) + "\n")
    return entry["key_id"]


def read(delta: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The signatures beside a delta, unchecked. Raises SignatureError if there are none or the file
    is damaged.
    """
    path = signature_path(delta)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["signatures"]
        if not all(
            isinstance(e[k], str)
            for e in entries
            for k in ("algorithm", "key_id", "signature", "delta_sha256")
        ):
            raise TypeError("a field is missing")
    except FileNotFoundError as error:
        raise SignatureError(f"{delta} is not signed: there is no {path}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SignatureError(
            f"{path} is damaged: {type(error).__name__}: {error}"
        ) from error
    return entries


def verify(
    delta: str | os.PathLike[str],
    public_key: str | os.PathLike[str],
    sha256: str | None = None,
) -> str:
    """Check that the owner of a key has signed a delta; returns the key's id.

    Args:
        delta: its file or folder; the signatures stand beside it.
        public_key: PEM file of a key that you trust. The key inside the signature file proves
            nothing and is not used.
        sha256: of the delta that was loaded (``Delta.sha256``), and that is therefore used. None:
            the file is read and checked here, and may be another one by the time it is loaded.

    Raises:
        SignatureError: no signature of that key holds for this delta.
        DeltaError: the delta is damaged.
    """
    public = _load_public(public_key)
    if sha256 is None:
        sha256 = str(read_file(delta_path(delta), None)[0]["file_sha256"])
    entries = read(delta)
    for entry in entries:
        try:
            public.verify(
                base64.b64decode(entry["signature"], validate=True), _message(sha256)
            )
            return key_id(public)
        # Of another key, or of this key for an earlier delta of that name: one that holds is
        # enough.
        except (InvalidSignature, ValueError):
            continue
    raise SignatureError(
        f"no signature of {delta} is of key {key_id(public)} ({public_key}) for this delta; there"
        f" are signatures that claim to be of {', '.join(e['key_id'] for e in entries) or 'nobody'}"
    )


def _message(sha256: str) -> bytes:
    return f"slicefine delta, version 1, SHA-256 {sha256}\n".encode()


def _load_key(path: str | os.PathLike[str], password: str | None) -> Ed25519PrivateKey:
    content = _read_key(path)
    try:
        key = serialization.load_pem_private_key(
            content, password.encode() if password else None
        )
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(
            f"{path} cannot be read as a private key in PEM: {error}"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(
            f"{path} holds a {type(key).__name__}; expected an Ed25519 private key (slicefine delta"
            " keygen)"
        )
    return key


def _load_public(path: str | os.PathLike[str]) -> Ed25519PublicKey:
    content = _read_key(path)
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(
            f"{path} cannot be read as a public key in PEM: {error}"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(
            f"{path} holds a {type(key).__name__}; expected an Ed25519 public key"
        )
    return key


def _read_key(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SignatureError(f"{path} cannot be read: {error.strerror or error}") from error
