"""Bundles and servers that several files use."""
from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from servers import Server, serving, write_served_bundle


@pytest.fixture(scope="session")
def served_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A bundle that may be shipped."
    return write_served_bundle(tmp_path_factory.mktemp("served")/"run")


@pytest.fixture(scope="module")
def server(served_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    "A server with the defaults, for the tests of a module."
    with serving(tmp_path_factory.mktemp("server")/"log", served_bundle) as found: yield found


@pytest.fixture
def photo() -> np.ndarray:
    "An image with three different mean colours."
    return np.random.default_rng(1).integers(0, (60, 120, 250), (20, 30, 3)).astype(np.uint8)


@pytest.fixture(scope="session")
def promtool() -> str:
    "Path of promtool; without it the test is skipped, or fails in CI."
    path = shutil.which("promtool")
    if path: return path
    remedy = "promtool is not installed (Debian: apt install prometheus)"
    pytest.fail(remedy) if os.environ.get("CI", "").lower() in ("1", "true", "yes") else pytest.skip(remedy)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Certificates: good, another, expired, and one that is not valid yet."
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    folder = tmp_path_factory.mktemp("tls")
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    for name, begin, end in (("good", -1, 90), ("another", -1, 3), ("expired", -9, -1), ("early", 1, 9)):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
        builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(),
                                          now + begin * day, now + end * day)
        names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        certificate = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
        (folder/f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        for suffix, algorithm in ((".key", serialization.NoEncryption()),
                                  (".locked", serialization.BestAvailableEncryption(b"secret"))):
            (folder/f"{name}{suffix}").write_bytes(key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, algorithm))
    return folder
