"""Make the test vectors of the primitives of secure aggregation.

    python -m tests.vectors.make_primitives

writes masking, encoding, shamir, sketch and gram ``.json`` beside this file. The tests run it and compare. A
vector that changes means that sites of another version no longer understand each other: never edit one.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedvision.secagg import encoding, gram, masking, shamir, sketch

FOLDER = Path(__file__).parent
KEY = bytes(range(32))


def key_of(*purpose: object) -> bytes:
    """Return 32 bytes that depend on the purpose only."""
    return hashlib.sha256(repr(purpose).encode()).digest()


def words(key: bytes, size: int) -> np.ndarray:
    """Return random-looking 32-bit words without the code under test: SHA-256 in counter mode."""
    blocks = b"".join(hashlib.sha256(key + bytes([i // 256, i % 256])).digest() for i in range(size // 8 + 1))
    return np.frombuffer(blocks[: 4 * size], "<u4").astype(np.uint32)


def digest(values: np.ndarray) -> str:
    """Return SHA-256 of an integer array's little-endian bytes."""
    return hashlib.sha256(values.astype(values.dtype.newbyteorder("<")).tobytes()).hexdigest()


def make_masking() -> dict[str, Any]:
    """Keystreams, one sum of masks, and one key derivation."""
    streams = []
    for key, size in ((KEY, 4), (bytes(32), 7), (key_of("stream"), 70000)):
        stream = masking.mask_stream(key, size)
        streams.append(
            {"key": key.hex(), "size": size, "first": stream[:8].tolist(), "sha256": digest(stream)}
        )
    vector = words(KEY, 70000)
    keys = [key_of("mask", index) for index in range(5)]
    signs = [1, -1, -1, 1, 1]
    before = digest(vector)
    masking.add_masks(vector, keys, signs)
    derived = HKDF(hashes.SHA256(), 32, bytes(16), b"fv/pair/v1|0,1").derive(KEY)
    return {
        "streams": streams,
        "sum": {
            "before_sha256": before,
            "keys": [key.hex() for key in keys],
            "signs": signs,
            "first": vector[:8].tolist(),
            "sha256": digest(vector),
        },
        "hkdf": {
            "ikm": KEY.hex(),
            "salt": bytes(16).hex(),
            "info": "fv/pair/v1|0,1",
            "okm": derived.hex(),
        },
        "bad": [
            {"why": "a key of 31 bytes", "keys": [KEY[:31].hex()], "signs": [1]},
            {"why": "a key twice", "keys": [KEY.hex(), KEY.hex()], "signs": [1, -1]},
            {"why": "a sign of 0", "keys": [KEY.hex()], "signs": [0]},
            {"why": "fewer signs than keys", "keys": [KEY.hex()], "signs": []},
        ],
    }


def make_encoding() -> dict[str, Any]:
    """Encoded updates of three sites and their decoded sum; statistics as limbs."""
    rule = {"num_sites": 3, "size": 5, "clip_norm": 2.0, "weight_cap": 100, "metric_caps": [4.0, 1.0]}
    coded = encoding.Encoding(3, 5, 2.0, 100, (4.0, 1.0))
    sites, total = [], np.zeros(coded.length, np.uint32)
    for number, (update, samples, metrics) in enumerate(
        (
            ([2.0, 0.0, 0.0, 0.0, 0.0], 250, [5.0, 0.25]),
            ([-0.5, 0.25, 1e-9, -1.0, 0.125], 40, [1.5, 0.5]),
            ([0.0, -2.0, 0.0, 0.0, 0.0], 1, [0.0, 1.0]),
        )
    ):
        encoded = coded.encode(np.array(update, np.float32), samples, metrics, key_of("rounding", number))
        total += encoded
        sites.append(
            {
                "update": update,
                "num_samples": samples,
                "metrics": metrics,
                "rounding_key": key_of("rounding", number).hex(),
                "encoded": encoded.tolist(),
            }
        )
    found = coded.decode(total)
    values = [0.0, 1.0, -1.0, 2.0**-20, -(2.0**-21), 123456789.125, -(2.0**38) + 1]
    return {
        "rule": rule,
        "scale": coded.scale,
        "norm_bound": coded.norm_bound,
        "sites": sites,
        "mean_update": found.mean_update.tolist(),
        "metrics": list(found.metrics),
        "total_weight": found.total_weight,
        "statistics": {"values": values, "encoded": encoding.encode_statistics(np.array(values)).tolist()},
        "bad_sums": [
            {"why": "no weight", "total": [0] * coded.length},
            {"why": "a negative weight", "total": [0] * (coded.length - 1) + [2**32 - 1]},
            {"why": "too much weight", "total": [0] * (coded.length - 1) + [2**31 - 1]},
            {"why": "another length", "total": [0] * (coded.length - 2) + [1000]},
        ],
    }


def make_shamir() -> dict[str, Any]:
    """Shares of fixed polynomials, with points in another order than ascending."""
    cases = []
    for threshold, points in ((1, [1, 2]), (3, [1, 2, 3]), (5, [255, 7, 1, 90, 33, 128, 2])):
        chosen = b"".join(key_of("coefficient", threshold, index) for index in range(threshold))
        rows = np.frombuffer(chosen, np.uint8).reshape(threshold, 32)
        shares = shamir.evaluate(rows, points)
        cases.append(
            {
                "coefficients": [row.tobytes().hex() for row in rows],
                "shares": {
                    str(point): row.tobytes().hex() for point, row in zip(points, shares, strict=True)
                },
            }
        )
    return {"cases": cases}


def make_sketch() -> dict[str, Any]:
    """Sketches of a short vector and of one that spans two slices."""
    beta = key_of("beta")
    cases = []
    for name, vector in (
        ("one", np.array([1], np.uint32)),
        ("short", words(KEY, 100)),
        ("long", words(KEY, 70000)),
        ("half of the ring", np.full(3, 1 << 31, np.uint32)),
    ):
        found = sketch.sketch(vector, beta)
        nonzero = np.flatnonzero(found)[:8]
        cases.append(
            {
                "name": name,
                "size": vector.size,
                "first_nonzero": {str(index): int(found[index]) for index in nonzero},
                "sha256": digest(found),
            }
        )
    return {"beta": beta.hex(), "cases": cases}


def make_gram() -> dict[str, Any]:
    """Shares of a rounded sketch and of zeros, and the inner products of four sites."""
    points, degree = [2, 3, 5, 250], 1
    seeds = {point: key_of("dealer", point) for point in points}
    bound = 1000.0
    sketches = {point: words(seeds[point], 2048) % np.uint32(200) for point in points}
    values = {point: gram.round_sketch(sketches[point], bound) for point in points}
    dealt = {point: gram.deal(values[point], degree, points, seeds[point]) for point in points}
    count = gram.zero_count(len(points), degree)
    zeros = {point: gram.deal_zero(count, 2 * degree, points, seeds[point]) for point in points}
    answers, checks = {}, {}
    for holder in points:
        held = {point: zeros[point][holder] for point in points}
        shares = {point: dealt[point][holder] for point in points}
        answers[holder] = gram.products(shares, [gram.extract_zeros(held, degree)])
        checks[holder] = gram.combine(list(held.values()), KEY)
    return {
        "points": points,
        "degree": degree,
        "norm_bound": bound,
        "rounded": {str(point): values[point][:8].tolist() for point in points},
        "first_share": {str(point): int(dealt[2][point][0]) for point in points},
        "shares_sha256": {str(point): digest(dealt[point][3]) for point in points},
        "zeros": {str(point): zeros[2][point].tolist() for point in points},
        "products": {str(holder): answers[holder].tolist() for holder in points},
        "checks": {str(holder): checks[holder].tolist() for holder in points},
        "inner_products": gram.interpolate(answers, 2 * degree).tolist(),
    }


MAKERS = {
    "masking": make_masking,
    "encoding": make_encoding,
    "shamir": make_shamir,
    "sketch": make_sketch,
    "gram": make_gram,
}


def text_of(name: str) -> str:
    """Return the content of a vector file as it must be."""
    return json.dumps(MAKERS[name](), indent=1) + "\n"


def main() -> None:
    """Write all files."""
    for name in MAKERS:
        (FOLDER / f"{name}.json").write_text(text_of(name))


if __name__ == "__main__":
    main()
