"""Signatures of bundles: who made one, and what was changed after that."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from servers import TOKEN, cvnb, encode, serving, write_served_bundle

from cvnb.core.errors import CvnbError, UsageError
from cvnb.serve.package import PackageOptions, package_bundle
from cvnb.serve.signing import PASSWORD_VARIABLE, check_signature, sign_bundle

PEM = serialization.Encoding.PEM


def write_pair(folder: Path, name: str, passphrase: bytes = b"", key: object = None) -> None:
    "Write NAME.pem and NAME.pub."
    key = key or ec.generate_private_key(ec.SECP256R1())
    locked = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    (folder/f"{name}.pem").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, locked))
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder/f"{name}.pub").write_bytes(public)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Pairs of keys: mine, other, locked, and one of another kind."
    folder = tmp_path_factory.mktemp("keys")
    for name in "mine", "other": write_pair(folder, name)
    write_pair(folder, "locked", b"a passphrase")
    write_pair(folder, "rsa", key=rsa.generate_private_key(65537, 2048))
    return folder


@pytest.fixture(scope="module")
def original(served_bundle: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The folder of a signed bundle and of its signature."
    folder = tmp_path_factory.mktemp("signed")
    shutil.copytree(served_bundle, folder/"bundle")
    done = cvnb("sign", folder/"bundle", "--key", keys/"mine.pem")
    assert (done.returncode, done.stdout.strip()) == (0, str(folder/"bundle.sig")), done.stderr
    return folder


@pytest.fixture
def signed(original: Path, tmp_path: Path) -> Path:
    "A signed bundle, to change."
    return shutil.copytree(original, tmp_path/"signed")/"bundle"


def test_signed_bundle_is_verified_wherever_it_lies(signed: Path, keys: Path, tmp_path: Path) -> None:
    moved = signed.rename(tmp_path/"pets")
    signature = tmp_path/"signed/bundle.sig"
    done = cvnb("verify", moved, "--key", keys/"mine.pub", "--signature", signature, "--json")
    first, *others = json.loads(done.stdout)["checks"]
    assert first == dict(check="signature", subject="bundle.sig", found="of the key mine.pub, over every file")
    assert others[0]["check"] == "description"


def test_library_s_own_command_verifies_it(signed: Path, keys: Path) -> None:
    command = [Path(sys.executable).with_name("model_signing"), "verify", "key", signed, "--signature",
               signed.with_name("bundle.sig"), "--public_key", keys/"mine.pub"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def plant(fault: str, bundle: Path) -> None:
    "Do something to a signed bundle."
    file = bundle/"labels.txt"
    signature = bundle.with_name("bundle.sig")
    if fault == "changed": file.write_text("cat\ndog\nowl\n\n")
    elif fault == "missing": file.unlink()
    elif fault == "link":
        shutil.move(file, bundle.parent/"labels.txt")
        file.symlink_to(bundle.parent/"labels.txt")
    elif fault == "unsigned": signature.unlink()
    elif fault == "no signature": signature.write_text('{"a": 1}')
    elif fault == "no JSON": signature.write_bytes(b"\0\xff")
    elif fault == "other content":
        envelope = json.loads(signature.read_text())
        envelope["dsseEnvelope"]["payload"] = envelope["dsseEnvelope"]["payload"][:-8] + "AAAAAAA="
        signature.write_text(json.dumps(envelope))
    elif fault != "other key": (bundle/fault).touch()


FAULTS = {"changed": "labels.txt was changed", "missing": "labels.txt is missing",
          "extra.bin": "extra.bin was not signed",
          ".gitignore": ".gitignore was not signed", "link": "symbolic link", "unsigned": "has no signature",
          "no signature": "is no signature", "no JSON": "is no signature",
          "other content": "was not made with the key of mine.pub",
          "other key": "was not made with the key of other.pub"}


@pytest.mark.parametrize("fault", FAULTS)
def test_bundle_that_is_not_what_was_signed_is_refused(fault: str, signed: Path, keys: Path) -> None:
    plant(fault, signed)
    with pytest.raises(CvnbError) as error:
        check_signature(signed, keys/("other.pub" if fault == "other key" else "mine.pub"))
    assert FAULTS[fault] in str(error.value) and "\n" not in str(error.value)


def test_commands_say_so_in_one_line(signed: Path, keys: Path) -> None:
    plant("extra.bin", signed)
    for command in ["verify", signed, "--key"], ["serve", signed, "--require-signature"]:
        done = cvnb(*command, keys/"mine.pub")
        assert done.returncode == 1 and "extra.bin was not signed" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and not done.stdout


@pytest.mark.parametrize("case, said", {"rsa.pem": "is not a key of the curves", "mine.pub": "holds no private key",
                                        "locked.pem": "CVNB_SIGN_PASSWORD", "none.pem": "cannot be read"}.items())
def test_unusable_key_is_refused(case: str, said: str, served_bundle: Path, keys: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said): sign_bundle(served_bundle, keys/case, tmp_path/"out.sig")
    assert not (tmp_path/"out.sig").exists()


def test_key_with_a_passphrase_signs(
    served_bundle: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "another")
    with pytest.raises(UsageError): sign_bundle(served_bundle, keys/"locked.pem", tmp_path/"out.sig")
    monkeypatch.setenv(PASSWORD_VARIABLE, "a passphrase")
    sign_bundle(served_bundle, keys/"locked.pem", tmp_path/"out.sig")
    assert check_signature(served_bundle, keys/"locked.pub", tmp_path/"out.sig")


def test_damaged_bundle_is_not_signed(served_bundle: Path, keys: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(served_bundle, tmp_path/"bundle")
    (folder/"labels.txt").write_text("other\n")
    with pytest.raises(CvnbError, match="labels.txt is missing or not"): sign_bundle(folder, keys/"mine.pem")
    with pytest.raises(UsageError, match="outside of what it signs"):
        sign_bundle(served_bundle, keys/"mine.pem", served_bundle/"bundle.sig")
    assert not [*tmp_path.glob("*.sig*"), *served_bundle.glob("*.sig*")]


def test_service_takes_signed_bundles_only(signed: Path, keys: Path, photo: object, tmp_path: Path) -> None:
    folder = tmp_path/"bundles"
    other = write_served_bundle(tmp_path/"other", weight=0.5)
    for name in "good", "unsigned", "changed": shutil.copytree(other, folder/name)
    for name in "good", "changed": sign_bundle(folder/name, keys/"mine.pem")
    (folder/"changed/labels.txt").write_text("cat\n")
    arguments = signed, "--require-signature", keys/"mine.pub", "--bundles", folder
    with serving(tmp_path/"log", *arguments, token=TOKEN) as server:
        swap = lambda name: server.ask("/bundle", json.dumps(dict(bundle=name)).encode(), "PUT")
        for name, said in dict(unsigned="has no signature", changed="labels.txt was changed").items():
            answer = swap(name)
            assert answer.status == 422 and said in answer.json["error"] and str(tmp_path) not in answer.json["error"]
        assert server.ask("/predict", encode(photo)).json["version"] == server.version
        assert swap("good").status == 200
        assert server.ask("/predict", encode(photo)).json["version"] != server.version


def test_container_holds_key_and_signature(signed: Path, keys: Path, tmp_path: Path) -> None:
    package_bundle(PackageOptions(signed, tmp_path/"out", signature_key=keys/"mine.pub"))
    text = (tmp_path/"out/Dockerfile").read_text()
    assert '"--require-signature", "/keys/bundle.pub"' in text and "COPY bundle.sig /\n" in text
    assert "model-signing==" in (tmp_path/"out/requirements.txt").read_text()
    assert check_signature(tmp_path/"out/bundle", tmp_path/"out/bundle.pub")
