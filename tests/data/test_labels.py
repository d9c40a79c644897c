"""Raw label tables: what is read from good ones, and the one line that names what is wrong with others."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from trees import write_image

from medcg_jax.data.labels import LabelledImage, lesion_mask, read_labels
from medcg_jax.data.records import Box
from medcg_jax.data.schema import ReleaseError

LIMIT = 10_000


@pytest.fixture
def root(tmp_path):
    """A folder with four images of 12 x 8 pixels and a mask for one of them."""
    for name in ("a b.png", "b.png", "c.png", "d.png"):
        write_image(tmp_path, f"x/{name}")
    mask = np.zeros((8, 12), np.uint8)
    mask[2:4, 1:5] = 255
    mask[6, 9] = 1
    Image.fromarray(mask).save(tmp_path / "x/mask.png")
    Image.fromarray(mask * 0).save(tmp_path / "x/black.png")
    Image.fromarray(mask[:4]).save(tmp_path / "x/short.png")
    (tmp_path / "x/text.png").write_text("no image")
    return tmp_path


def read(root, text, encoding="utf-8"):
    (root / "labels.csv").write_bytes(text.encode(encoding))
    return read_labels(root / "labels.csv", root, LIMIT)


def test_classes(root):
    text = "image,label,split,group,data-no\nx/b.png, Malignant ,train,p1,7\n\nx/a b.png,Benign,test,p2,8\n"
    table = read(root, text + 'x/b.png,"Cyst, simple",train,p1,7\n', "utf-8-sig")
    assert not table.has_boxes
    assert table.images == (
        LabelledImage("x/a b.png", ("Benign",), (8, 12), "test", "p2", "8"),
        LabelledImage("x/b.png", ("Cyst, simple", "Malignant"), (8, 12), "train", "p1", "7"),
    )
    assert read(root, text.replace("\n", "\r\n")).images[0] == table.images[0]


def test_boxes(root):
    lines = ["x/b.png,Mass,4,1,12,8", "x/b.png,Mass,0,0.5,3,2", "x/c.png,,,,,"]
    table = read(root, "\n".join(["image,label,x1,y1,x2,y2", *lines]))
    assert table.has_boxes and table.images == (
        LabelledImage("x/b.png", ("Mass",), (8, 12), boxes=(Box("Mass", 0, 0.5, 3, 2), Box("Mass", 4, 1, 12, 8))),
        LabelledImage("x/c.png", (), (8, 12)),
    )


def test_masks(root):
    table = read(root, "image,label,mask\nx/b.png,Mass,x/mask.png\nx/c.png,Mass,x/black.png\nx/d.png,,\n")
    assert table.has_boxes and table.images == (
        LabelledImage("x/b.png", ("Mass",), (8, 12), boxes=(Box("Mass", 1, 2, 5, 4), Box("Mass", 9, 6, 10, 7))),
        LabelledImage("x/c.png", (), (8, 12)),
        LabelledImage("x/d.png", (), (8, 12)),
    )


@given(arrays(bool, (5, 7)), st.sampled_from(["1", "L", "I;16", "P", "RGB", "RGBA", "LA"]))
def test_masks_of_any_kind_of_png(tmp_path_factory, lesion, mode):
    path = tmp_path_factory.mktemp("mask") / "m.png"
    if mode == "I;16":
        Image.fromarray(lesion.astype(np.uint16)).save(path)
    elif mode == "P":  # black is the second colour
        image = Image.fromarray((~lesion).astype(np.uint8), mode="P")
        image.putpalette([9, 0, 0, 0, 0, 0])
        image.save(path)
    else:
        # Opaque where there is no lesion either.
        Image.fromarray(lesion.astype(np.uint8) * 255).convert(mode).save(path)
    np.testing.assert_array_equal(lesion_mask(path, LIMIT), lesion)


@given(st.permutations(range(6)))
def test_the_order_of_lines_does_not_matter(tmp_path_factory, order):
    root = tmp_path_factory.getbasetemp() / "order"
    write_image(root, "x/b.png")
    write_image(root, "x/c.png")
    lines = [f"x/{name}.png,{label},{x},0,{x + 2},3" for name in "bc" for label, x in (("M", 1), ("N", 1), ("M", 4))]
    header = "image,label,x1,y1,x2,y2"
    wanted = read(root, "\n".join([header, *lines]))
    assert read(root, "\n".join([header, *(lines[i] for i in order)])) == wanted


CLASSES, BOXES, MASKS = "image,label", "image,label,x1,y1,x2,y2", "image,label,mask"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "labels.csv: line 1: column 'image' is missing"),
        (
            "image,lable\nx/b.png,M",
            "line 1: column 'lable' is not known; expected image, label, then nothing, mask or x1",
        ),
        ("image,label,grop\nx/b.png,M,1", "line 1: column 'grop' is not known"),
        ("image,label,label\n", "line 1: a column occurs twice"),
        ("image,label,x1,y1\n", "line 1: columns image, label, x1, y1: expected mask or all of x1, y1, x2, y2"),
        ("image,label,mask,x1,y1,x2,y2\n", "mask or all of"),
        (CLASSES, "labels.csv: no line below the header"),
        (f"{CLASSES}\nx/b.png", "line 2: 1 cells; expected 2: image, label"),
        (f'{CLASSES}\nx/b.png,"M', "no CSV: unexpected end of data"),
        (f"{CLASSES}\nx/b.png,M\nx/c.png,", "line 3: label '' is empty; expected a label"),
        (f"{CLASSES}\nx/b.png,a\tb", r"line 2: label 'a\\tb' has signs that cannot be printed"),
        (f'{CLASSES}\nx/b.png,"a\nb"', r"line 3: label 'a\\nb' has signs"),
        (f"{CLASSES}\nx/b.png,mass\nx/c.png,Mass", "line 3: label 'Mass' is spelled 'mass' in line 2"),
        (f"{CLASSES}\nx/b.png,M\nx/b.png,M", "line 3: image 'x/b.png' has all of this in line 2; expected once"),
        (f"{CLASSES}\nx/b.png,M\nx//b.png,N", "is the file that line 3 calls 'x//b.png'; expected one name"),
        (f"{CLASSES}\nx/none.png,M", "labels.csv: line 2: image 'x/none.png' cannot be opened: No such file"),
        (f"{CLASSES}\n../b.png,M", "line 2: image '../b.png' climbs out"),
        (f"{CLASSES}\nx/text.png,M", "line 2: image 'x/text.png' cannot be used: not an image of a known format"),
        (f"{CLASSES},split\nx/b.png,M,val", "line 2: split 'val' is none of train, test"),
        (f"{CLASSES},split\nx/b.png,M,", "line 2: split '' is none of train, test"),
        (f"{CLASSES},split\nx/b.png,M,train\nx/b.png,N,test", "line 3: split 'test' of image 'x/b.png', which"),
        (f"{CLASSES},split,group\nx/b.png,M,train,p\nx/c.png,N,test,p", "group 'p' is in test here and in train in"),
        (f"{BOXES}\nx/b.png,M,0,0,,4", "line 2: x2 '' is empty where the label is 'M'"),
        (f"{BOXES}\nx/b.png,,0,0,2,4", "line 2: label '' is empty where x1 is not"),
        (f"{BOXES}\nx/b.png,M,a,0,2,4", "line 2: x1 'a' is no number"),
        (f"{BOXES}\nx/b.png,M,nan,0,2,4", "line 2: x1 'nan' is not inside the image of 12 x 8 pixels"),
        (f"{BOXES}\nx/b.png,M,0,0,2,9", "line 2: y2 '9' is not inside the image of 12 x 8 pixels; expected 0 to 8"),
        (f"{BOXES}\nx/b.png,M,2,0,2,4", "line 2: x2 '2' is not above x1 '2'"),
        (f"{BOXES}\nx/b.png,M,0,0,2,4\nx/b.png,M,0,0,2.0,4", "has all of this in line 2"),
        (f"{BOXES}\nx/b.png,M,0,0,2,4\nx/b.png,,,,,", "line 3: label '' is empty where image 'x/b.png' has"),
        (
            f"{MASKS}\nx/b.png,M,x/short.png",
            "line 2: mask 'x/short.png' has 12 x 4 pixels; expected 12 x 8, as its image",
        ),
        (f"{MASKS}\nx/b.png,M,x/text.png", "line 2: mask 'x/text.png' is no mask"),
        (
            f"{CLASSES}\nx/b.png,N\u00e4vus\nx/c.png,Na\u0308vus",
            r"line 3: label 'Na.u0308vus' is spelled 'N.xe4vus' in",
        ),
        (f"{CLASSES}\nx/b.png,torn lateral\nx/c.png,torn  lateral", "line 3: label 'torn  lateral' is spelled 'torn l"),
        (f"{CLASSES}\nx/b.png,1\nx/c.png,1.0", "line 3: label '1.0' is spelled '1' in line 2; expected one spelling"),
        (f"{CLASSES}\nx/b.png,be\u200bnign", r"label 'be.u200bnign' has signs that cannot be printed"),
        (f"{CLASSES}\nx/b.png,<image> cyst", "label '<image> cyst' spells '<image>', which prompts put themselves"),
        (f"{CLASSES}\nx/b.png,{'x' * 501}", "label 'x+...' has 501 signs; expected at most 500"),
        (f"{CLASSES}\nx/b.png,{'x' * 200_000}", "line 2: no CSV: field larger than field limit"),
        (f"{CLASSES}\nx/b.png,M\0", r"line 2: (label 'M.x00' has signs|no CSV: line contains NUL)"),
        (f"{CLASSES},group\nx/b.png,M,{'1' * 300}", "group '1+...' has more than 200 signs"),
        ("image;label\nx/b.png;M", "column 'image;label' is not known; .* with commas between them"),
        (f"{BOXES}\nx/b.png,M,0,0,1_0,4", "line 2: x2 '1_0' is no number"),
        (f"{BOXES}\nx/b.png,M,0.1,0.2,0.5,1\nx/c.png,M,0,0,1,1", "all corners of 2 boxes are 0 to 1, so they are sh"),
        (f"{MASKS}\nx/b.png,M,/x.png", "labels.csv: line 2, mask: image '/x.png' is absolute"),
    ],
)
def test_what_is_wrong_is_named_by_line_and_column(root, text, message):
    with pytest.raises(ReleaseError, match=message) as error:
        read(root, text)
    assert str(error.value).startswith("labels.csv: ") and "\n" not in str(error.value)


def test_groups_of_two_datasets_are_two(root):
    text = f"{CLASSES},split,group,data-no\nx/b.png,M,train,p,1\nx/c.png,N,test,p,2\n"
    assert [own.split for own in read(root, text).images] == ["train", "test"]


def test_large_or_missing_files(root):
    with pytest.raises(ReleaseError, match="labels.csv: not UTF-8"):
        read(root, "image,label\nx/b.png,é", "latin-1")
    with pytest.raises(ReleaseError, match="none.csv: No such file"):
        read_labels(root / "none.csv", root, LIMIT)
    (root / "labels.csv").write_text("image,label,mask\nx/b.png,M,x/mask.png")
    with pytest.raises(ReleaseError, match="12 x 8 pixels pad to 12 x 12; expected at most 100"):
        read_labels(root / "labels.csv", root, 100)


def test_noise_is_refused_in_one_line(root):
    signs = random.Random(0)
    for _ in range(300):
        text = "".join(signs.choice('image,label\n"x/b.png1\r\0\x1c\u2028 ') for _ in range(40))
        with pytest.raises(ReleaseError) as error:
            read(root, signs.choice(["", f"{CLASSES}\n", f"{BOXES}\n"]) + text)
        assert len(str(error.value).splitlines()) == 1
