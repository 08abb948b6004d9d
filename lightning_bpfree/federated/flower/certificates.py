"""Certificates of a SuperLink: validation before anything starts, and generation for the loopback device."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path
from typing import Any, NamedTuple

from lightning_bpfree.core.arguments import PositiveFloat, checked


class Certificates(NamedTuple):
    """Paths of the files that TLS needs.

    Args:
        ca: certificate of the authority that clients trust, PEM.
        certificate: certificate of the server, PEM.
        key: private key of the server, PEM.
    """

    ca: Path
    certificate: Path
    key: Path

    def check(self) -> None:
        """Raise ValueError if a file is missing, is no certificate or key, is expired, or does not match the others.

        Flower would otherwise report these errors much later, or in each client separately.
        """
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        read = {name: _read(name, path) for name, path in self._asdict().items()}
        loaded: dict[str, Any] = {}
        for name, load in (
            ("ca", x509.load_pem_x509_certificate),
            ("certificate", x509.load_pem_x509_certificate),
            ("key", lambda text: load_pem_private_key(text, None)),
        ):
            try:
                loaded[name] = load(read[name])
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"Certificates: {name}={getattr(self, name)}: it is no PEM file of that kind."
                ) from error
        now = datetime.datetime.now(datetime.timezone.utc)
        for name in ("ca", "certificate"):
            first, last = loaded[name].not_valid_before_utc, loaded[name].not_valid_after_utc
            if not first <= now <= last:
                raise ValueError(
                    f"Certificates: {name}={getattr(self, name)}: valid from {first:%Y-%m-%d %H:%M} to "
                    f"{last:%Y-%m-%d %H:%M} UTC, and now it is {now:%Y-%m-%d %H:%M}: have it renewed."
                )
        if loaded["certificate"].public_key() != loaded["key"].public_key():
            raise ValueError(f"Certificates: key={self.key}: it is not the key of certificate={self.certificate}.")
        try:
            loaded["certificate"].verify_directly_issued_by(loaded["ca"])
        except Exception as error:
            raise ValueError(
                f"Certificates: certificate={self.certificate}: not issued by ca={self.ca}: clients would refuse it."
            ) from error


def _read(name: str, path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"Certificates: {name}={path}: cannot be read ({error.strerror}): give the path of a PEM file."
        ) from error


@checked
def loopback_certificates(folder: Path, days: PositiveFloat = 1.0) -> Certificates:
    """Create an authority and a certificate for ``127.0.0.1`` and ``localhost``, and return their paths.

    They are for tests and experiments: the key of the authority is discarded, and the certificate expires soon.

    Args:
        folder: where the files are written; it must exist.
        days: days for which they are valid, > 0.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.timezone.utc)
    keys = {who: ec.generate_private_key(ec.SECP256R1()) for who in ("ca", "server")}
    names = {who: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"bpfree {who}")]) for who in keys}

    def built(who: str) -> Any:
        builder = x509.CertificateBuilder().subject_name(names[who]).issuer_name(names["ca"])
        builder = builder.public_key(keys[who].public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(hours=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=days))
        return builder.add_extension(x509.BasicConstraints(who == "ca", None), critical=True)

    identifier = x509.SubjectKeyIdentifier.from_public_key(keys["ca"].public_key())
    usage = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    ca = built("ca").add_extension(x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True), critical=True)
    ca = ca.add_extension(identifier, critical=False).sign(keys["ca"], hashes.SHA256())
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    server = built("server").add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    server = server.add_extension(authority, critical=False).sign(keys["ca"], hashes.SHA256())
    made = Certificates(folder / "ca.crt", folder / "server.pem", folder / "server.key")
    _write(made, ca, server, keys["server"])
    return made


def _write(made: Certificates, ca: Any, server: Any, key: Any) -> None:
    from cryptography.hazmat.primitives import serialization as forms

    made.ca.write_bytes(ca.public_bytes(forms.Encoding.PEM))
    made.certificate.write_bytes(server.public_bytes(forms.Encoding.PEM))
    text = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    made.key.touch(mode=0o600)
    made.key.write_bytes(text)


def node_keys(folder: Path, number: int) -> tuple[Path, Path]:
    """Create the key pair of a node, and return the paths of the private and public keys, in OpenSSH's format.

    Args:
        folder: where the files are written; it must exist.
        number: the node's number, for the file names.
    """
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    private, public = folder / f"node{number}", folder / f"node{number}.pub"
    text = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.OpenSSH, forms.NoEncryption())
    private.touch(mode=0o600)
    private.write_bytes(text)
    public.write_bytes(key.public_key().public_bytes(forms.Encoding.OpenSSH, forms.PublicFormat.OpenSSH))
    return private, public
