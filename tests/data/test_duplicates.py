"""Same and nearly same images are found, others and blank ones are not; the search finds what all pairs give."""

import hashlib
import io
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from medcg_jax.data.duplicates import (
    FORMS,
    MOST_BITS,
    NEAR_BITS,
    Group,
    ImageHashes,
    groups,
    hash_file,
    image_hashes,
    near_pairs,
    near_pairs_between,
    perceptual_hash,
    pixel_digest,
)
from medcg_jax.data.images import ImageError, load_image
from medcg_jax.data.records import RecordSet


def brute(a: np.ndarray, b: np.ndarray, bits: int) -> list[tuple[int, int]]:
    apart = np.unpackbits(a[:, None] ^ b[None], axis=2).sum(2)
    return [tuple(map(int, pair)) for pair in np.argwhere(apart <= bits)]


def flipped(row: np.ndarray, bits, generator) -> np.ndarray:
    places = generator.permutation(256)[:bits]
    changed = np.unpackbits(row)
    changed[places] ^= 1
    return np.packbits(changed)


@st.composite
def crowds(draw):
    """Hashes of a few crowds, each as wide as drawn, with copies among them: every bucket may be crowded."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.integers(0, 40))
    centres = generator.integers(0, 256, (draw(st.integers(1, 4)), 32), dtype=np.uint8)
    rows = [
        flipped(centres[generator.integers(len(centres))], generator.integers(spread + 1), generator)
        for _ in range(draw(st.integers(0, 40)))
    ]
    return np.array(rows, np.uint8).reshape(-1, 32)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(crowds(), st.sampled_from([0, 1, 7, 20, 28, 40]))
def test_the_search_finds_what_all_pairs_give(hashes, bits):
    hashes[:, 0] &= 0x7F  # the bit of the mean
    found = near_pairs(hashes, bits)
    half = len(hashes) // 3
    between = near_pairs_between(hashes[:half], hashes[half:], bits, as_is=True)
    assert [tuple(pair) for pair in found.tolist()] == [(i, j) for i, j in brute(hashes, hashes, bits) if i < j]
    assert list(zip(between.a.tolist(), between.b.tolist(), strict=True)) == brute(hashes[:half], hashes[half:], bits)
    every = near_pairs_between(hashes[:half], hashes[half:], bits)
    assert set(zip(between.a.tolist(), between.b.tolist())) <= set(zip(every.a.tolist(), every.b.tolist()))


def test_bits_at_the_edge_and_beyond_what_is_accepted():
    generator = np.random.default_rng(0)
    first = generator.integers(0, 256, 32, dtype=np.uint8) & np.array([0x7F] + [0xFF] * 31, np.uint8)
    rows = np.array([first, *(flipped(first, count, generator) for count in (19, 20, 21))])
    assert near_pairs(rows, 20)[:2].tolist() == [[0, 1], [0, 2]] and [0, 3] not in near_pairs(rows, 20).tolist()
    assert near_pairs_between(rows[:1], rows[1:], 21).bits.tolist() == [19, 20, 21]
    assert near_pairs(rows[:0], 20).shape == (0, 2) and len(near_pairs_between(rows, rows[:0], 20).a) == 0
    for bits in (-1, MOST_BITS + 1):
        with pytest.raises(ValueError, match=f"bits={bits}: expected 0 to 40"):
            near_pairs(rows, bits)


@pytest.mark.timeout(60)
def test_ten_thousand_images_against_a_thousand_in_all_forms_take_seconds():
    generator = np.random.default_rng(1)
    hashes = generator.integers(0, 256, (11_000, 32), dtype=np.uint8)
    hashes[:, 0] &= 0x7F
    hashes[5000:5300] = hashes[10_500]
    began = time.process_time()
    found = near_pairs_between(hashes[:10_000], hashes[10_000:], NEAR_BITS)
    assert time.process_time() - began < 10
    assert found.a.tolist() == list(range(5000, 5300)) and set(found.b.tolist()) == {500}


# --- images


def picture(seed: int, height: int = 120, width: int = 160) -> np.ndarray:
    """Soft shapes with some grain, as photographs have."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return np.clip(soft + generator.normal(0, 3, soft.shape), 0, 255).astype(np.uint8)


def saved(image: np.ndarray, form: str, **how) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, form, **how)
    return content.getvalue()


def as_print(content: bytes) -> ImageHashes:
    return image_hashes(load_image(content, 10**7), hashlib.sha256(content).digest())


def resized(image: np.ndarray, factor: float) -> np.ndarray:
    size = round(image.shape[1] * factor), round(image.shape[0] * factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


CHANGES = {
    "jpeg 60": lambda image: load_image(saved(image, "JPEG", quality=60), 10**7),
    "half": lambda image: resized(image, 0.5),
    "larger": lambda image: resized(image, 1.5),
    "brighter": lambda image: np.asarray(ImageEnhance.Brightness(Image.fromarray(image)).enhance(1.05)),
    "flatter": lambda image: np.asarray(ImageEnhance.Contrast(Image.fromarray(image)).enhance(0.95)),
    "grey": lambda image: np.asarray(Image.fromarray(image).convert("L").convert("RGB")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_image_is_near_its_own_alone(change):
    own = np.array([np.frombuffer(perceptual_hash(picture(i)), np.uint8) for i in range(30)])
    changed = np.array([np.frombuffer(perceptual_hash(CHANGES[change](picture(i))), np.uint8) for i in range(30)])
    found = near_pairs_between(own, changed, NEAR_BITS)
    assert found.a.tolist() == found.b.tolist() == list(range(30)) and not found.form.any()
    assert not len(near_pairs(own, NEAR_BITS))


# What numpy does to the test's image -> what the match is called.
TURNS = {
    "": lambda a: a,
    "mirrored": lambda a: a[:, ::-1],
    "mirrored top to bottom": lambda a: a[::-1],
    "turned by 180": lambda a: np.rot90(a, 2),
    "mirrored along the diagonal": lambda a: a.transpose(1, 0, 2),
    "turned right by 90": lambda a: np.rot90(a, -1),
    "turned left by 90": lambda a: np.rot90(a),
    "mirrored along the other diagonal": lambda a: np.rot90(a, 2).transpose(1, 0, 2),
}


@pytest.mark.parametrize("change", ["jpeg 60", "half"])
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("turn", TURNS)
def test_a_turned_image_is_near_its_own_alone_and_named(turn, inverted, change):
    tests = np.array([np.frombuffer(perceptual_hash(picture(i)), np.uint8) for i in range(20)])
    images = [np.ascontiguousarray(TURNS[turn](CHANGES[change](picture(i)))) for i in range(20)]
    training = [np.frombuffer(perceptual_hash(255 - image if inverted else image), np.uint8) for image in images]
    found = near_pairs_between(np.array(training), tests, NEAR_BITS)
    assert found.a.tolist() == found.b.tolist() == list(range(20))
    name = f"{turn} and inverted".removeprefix(" and ") if inverted else turn
    assert {FORMS[form] for form in found.form} == {name}


def test_groups_and_their_kinds():
    a, b, c, other = (picture(i) for i in range(4))
    contents = [
        saved(other, "PNG"),
        saved(a, "PNG"), saved(b, "JPEG", quality=95), saved(c, "PNG"),
        saved(a, "PNG"),  # the same bytes
        saved(load_image(saved(b, "JPEG", quality=95), 10**7), "BMP"),  # the same pixels
        saved(c, "BMP"), saved(c, "JPEG", quality=60),  # the same pixels, and near
    ]  # fmt: skip
    prints = [as_print(content) for content in contents]
    assert groups(prints) == [Group("same bytes", (1, 4)), Group("same pixels", (2, 5)), Group("near", (3, 6, 7))]
    assert groups([]) == groups(prints[:1]) == []
    # An image that could not be decoded has its bytes alone.
    assert groups([ImageHashes(b"x"), ImageHashes(b"y"), ImageHashes(b"x")]) == [Group("same bytes", (0, 2))]


def test_ties_of_a_chain_make_one_group():
    generator = np.random.default_rng(5)
    rows = [generator.integers(0, 256, 32, dtype=np.uint8)]
    for _ in range(4):
        rows.append(rows[-1] ^ np.packbits(np.arange(256) // 16 == len(rows)))
    rows = [row & np.array([0x7F] + [0xFF] * 31, np.uint8) for row in rows]
    prints = [ImageHashes(bytes([i]), bytes([i]), row.tobytes()) for i, row in enumerate(rows)]
    assert groups(prints, 16) == [Group("near", (0, 1, 2, 3, 4))] and groups(prints, 15) == []


def test_blank_images_are_the_same_by_their_bytes_and_pixels_alone():
    generator = np.random.default_rng(2)
    blanks = [np.full((60, 80, 3), grey, np.uint8) for grey in (0, 128, 255)]
    blanks += [np.clip(generator.normal(90, 5, (300, 300, 3)), 0, 255).astype(np.uint8) for _ in range(3)]
    blanks.append(blanks[0].copy())
    assert {perceptual_hash(image) for image in blanks} == {b""}
    prints = [image_hashes(image, bytes([place])) for place, image in enumerate(blanks)]
    assert groups(prints) == [Group("same pixels", (0, 6))]
    # A small thing on a plain ground is no blank image.
    spotted = blanks[1].copy()
    spotted[20:40, 30:50] = 200
    assert len(perceptual_hash(spotted)) == 32


def test_digests_are_those_of_records(tmp_path):
    image = picture(0)
    held = RecordSet([None], image[None])
    assert pixel_digest(image) == held.image_digest(0) == pixel_digest(np.asfortranarray(image))
    assert pixel_digest(image) != pixel_digest(image.reshape(160, 120, 3))
    (tmp_path / "a.png").write_bytes(saved(image, "PNG"))
    assert hash_file(tmp_path / "a.png", 10**7) == as_print(saved(image, "PNG"))
    with pytest.raises(ImageError, match="no.png.*No such file"):
        hash_file(tmp_path / "no.png", 10**7)


def test_real_images_saved_again_are_found_and_different_patients_are_not(shared_dir):
    """Of 220 images of every dataset of the small pack."""
    paths = sorted(path for path in (shared_dir / "data" / "medmat-mini" / "med-mat").rglob("*") if path.is_file())
    images = [load_image(path, 10**7) for path in paths[::26]]
    for name in ("jpeg 60", "half", "brighter"):
        changed = [CHANGES[name](image) for image in images]
        both = [np.array([np.frombuffer(perceptual_hash(i), np.uint8) for i in part]) for part in (images, changed)]
        near = near_pairs_between(*both, NEAR_BITS, as_is=True)
        found = np.stack([near.a, near.b], axis=1).tolist()
        missed = [i for i in range(len(images)) if [i, i] not in found]
        assert len(missed) <= 2, name
        assert len([pair for pair in found if pair[0] != pair[1]]) <= 4, name
