"""Certificate authorities for tests, and certificates that they sign."""

import datetime
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

_PEM = Encoding.PEM


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    signer: ec.EllipticCurvePrivateKey,
    days: int = 1,
) -> x509.Certificate:
    """Makes a certificate for localhost that expires in some days, or did days ago.

    A self-signed one is an authority.
    """
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=9))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(key is signer, None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    return builder.sign(signer, hashes.SHA256())


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as PEM."""

    cert: bytes
    key: bytes
    serial: int

    def put(self, cert: Path, key: Path) -> None:
        """Replaces both files atomically, as a tool that renews certificates does."""
        for path, data in ((cert, self.cert), (key, self.key)):
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_bytes(data)
            unfinished.rename(path)


class Authority:
    """Signs certificates for localhost."""

    def __init__(self, name: str) -> None:
        self._subject, self._key = name, ec.generate_private_key(ec.SECP256R1())
        made = _certificate(name, self._key, name, self._key)
        self.cert = made.public_bytes(_PEM)

    def pair(self, name: str, password: bytes = b"", days: int = 1) -> Pair:
        """Makes a key and a certificate for it."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = _certificate(name, key, self._subject, self._key, days)
        hidden: KeySerializationEncryption = NoEncryption()
        if password:
            hidden = BestAvailableEncryption(password)
        text = key.private_bytes(_PEM, PrivateFormat.PKCS8, hidden)
        return Pair(made.public_bytes(_PEM), text, made.serial_number)

    def credentials(self, pair: Pair | None = None) -> grpc.ChannelCredentials:
        """Makes credentials of a client that trusts this authority, and presents `pair`."""
        key, cert = (pair.key, pair.cert) if pair else (None, None)
        return grpc.ssl_channel_credentials(self.cert, key, cert)


def serial_at(address: str) -> int:
    """Returns the serial number of the certificate that a server presents to a new connection."""
    host, _, port = address.rpartition(":")
    certificate = ssl.get_server_certificate((host, int(port)), timeout=300)
    return x509.load_pem_x509_certificate(certificate.encode()).serial_number
