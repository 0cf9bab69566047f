"""Create and read the certificates of an authority and of a coordinator's server."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as formats
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlearn.deploy.key_files import CA, CA_KEY, KeysError, read_key_bytes
from fedlearn.errors import is_count, require

CA_DAYS = 3650
CLOCK_SKEW = timedelta(minutes=5)  # a node with a slow clock must accept a new certificate


def new_authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """Return the certificate of a new authority, which signs itself."""
    name = "fedlearn authority"
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = dict.fromkeys(("key_encipherment", "data_encipherment", "key_agreement", "content_commitment"), False)
    usage |= dict.fromkeys(("digital_signature", "encipher_only", "decipher_only"), False)
    return (
        _unsigned(name, issuer, key.public_key(), timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        .sign(key, hashes.SHA384())
    )


def server_certificate(
    folder: Path, key: ec.EllipticCurvePrivateKey, hosts: Sequence[str], *, days: int
) -> x509.Certificate:
    """Return a server certificate that the authority in a folder has signed.

    Args:
        folder: folder with all keys.
        key: key of the server.
        hosts: names and IP addresses of the server.
        days: validity in days, >= 1.
    """
    authority_key, authority = _load_authority(folder)
    alternatives = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    return (
        _unsigned(f"fedlearn coordinator {hosts[0]}"[:64], authority.subject, key.public_key(), timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(alternatives, critical=False)
        .add_extension(usage, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def expiry(certificate: Path) -> datetime:
    """Return the time at which a certificate expires, in UTC.

    Raises:
        KeysError: The file is missing or is not a certificate.
    """
    try:
        return x509.load_pem_x509_certificate(read_key_bytes(certificate)).not_valid_after_utc
    except ValueError as error:
        fix = "renew the certificate: python -m fedlearn.deploy.keys renew FOLDER"
        raise KeysError(f"{certificate} is not a certificate: {error}\n  advice    {fix}") from error


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """Return the names and IP addresses in a server certificate."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def check_certificate_settings(hosts: Sequence[str], days: int) -> None:
    """Refuse malformed hosts and numbers of days.

    Raises:
        SettingError: A host or the number of days is invalid.
    """
    require(is_count(days), "--days", days, "a whole number >= 1", "--days 365")
    expected = "names or IP addresses of the coordinator"
    is_valid = bool(hosts) and all(re.fullmatch(r"[A-Za-z0-9.:_-]+", host) for host in hosts)
    require(is_valid, "--host", " ".join(hosts) or "missing", expected, "--host coordinator.example.org")


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key in the format PEM."""
    return key.private_bytes(formats.Encoding.PEM, formats.PrivateFormat.PKCS8, formats.NoEncryption())


def _unsigned(
    name: str, issuer: x509.Name, public: ec.EllipticCurvePublicKey, valid: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + valid)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _load_authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = formats.load_pem_private_key(read_key_bytes(folder / CA_KEY), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key, x509.load_pem_x509_certificate(read_key_bytes(folder / CA))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
