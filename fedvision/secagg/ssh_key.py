"""Node keys in the file format of OpenSSH, the only one that Flower's own SuperNode reads."""

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedvision.secagg.certificates import parse_private


def ssh_private(node_key: bytes) -> bytes:
    """Return a private key in OpenSSH's format.

    Args:
        node_key: The same key as ``issuing.new_node_key`` makes it.

    Raises:
        Refused: It is no such key, or encrypted.
    """
    return parse_private(node_key).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
