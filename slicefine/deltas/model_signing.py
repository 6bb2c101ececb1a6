"""OpenSSF model signing for publication: one signature over every file of a folder, by an
elliptic-curve key of one's own.

The signature is a Sigstore bundle, which the ``model_signing`` command and other tools of that
format verify without slicefine.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

try:
    from cryptography.hazmat.primitives.asymmetric import ec
    from model_signing import hashing, signing, verifying
except ImportError as error:
    raise ImportError(
        f"publication needs OpenSSF model-signing and what it imports ({error}): pip install"
        " 'slicefine[sign]'"
    ) from error

from slicefine import atomic
from slicefine.deltas.signing import SignatureError, write_key

FILE = "model.sig"


def new_key(path: str | os.PathLike[str], password: str | None = None) -> Path:
    """Write a P-256 private key to ``path`` and its public key to ``path.pub``; returns the latter.
    model-signing takes no Ed25519.

    Raises FileExistsError rather than replace a key.
    """
    return write_key(ec.generate_private_key(ec.SECP256R1()), path, password)


def sign(
    folder: str | os.PathLike[str], key: str | os.PathLike[str], password: str | None = None
) -> Path:
    """Sign every file of a folder (a delta's or a merged model's); writes and returns ``model.sig``
    in it.

    key: PEM file of an elliptic-curve private key (P-256, P-384, P-521). Raises SignatureError for
        another kind of key.
    """
    folder = _folder(folder)
    target = folder / FILE
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=Path(key), password=password)
    except (
        ValueError,
        TypeError,
        OSError,
        AttributeError,
    ) as error:  # the last for keys without a curve, such as Ed25519's
        raise SignatureError(
            f"{key} cannot sign for publication: {error}. Expected a P-256 key in PEM"
        ) from error
    with tempfile.TemporaryDirectory() as outside:
        signature = Path(outside) / FILE
        ignored = hashing.Config().set_ignored_paths(paths=[target], ignore_git_paths=True)
        config.set_hashing_config(ignored).sign(folder, signature)
        atomic.write_text(target, signature.read_text(encoding="utf-8"))
    return target


def verify(folder: str | os.PathLike[str], public_key: str | os.PathLike[str]) -> None:
    """Check that every file of a folder is as the owner of a key has signed it, and that none has
    come or gone.

    Raises SignatureError otherwise.
    """
    folder = _folder(folder)
    if not (folder / FILE).is_file():
        raise SignatureError(f"{folder} is not signed for publication: there is no {FILE} in it")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=Path(public_key))
        config.set_hashing_config(
            hashing.Config().set_ignored_paths(paths=[folder / FILE], ignore_git_paths=True)
        )
        config.verify(folder, folder / FILE)
    except Exception as error:  # model-signing lets errors of its parsers through, of many kinds
        raise SignatureError(
            f"{folder} is not as the owner of {public_key} signed it: {type(error).__name__}:"
            f" {error}"
        ) from error


def _folder(folder: str | os.PathLike[str]) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise SignatureError(
            f"{folder} is no folder; publication signs a whole folder, a delta's or a merged"
            " model's"
        )
    return (
        folder.resolve()
    )  # model-signing 1.1 takes its own signature for another file where paths are relative
