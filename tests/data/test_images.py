"""Images as people have them: turned, transparent, of every mode, damaged, enormous, linked."""

import io
import os
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from apt_model.data.image_options import ImageOptions
from apt_model.data.images import load_images

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def picture(width=8, height=4):
    """Left half red, right half blue, the left of the top row green."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = RED, BLUE
    pixels[0, : width // 2] = GREEN
    return Image.fromarray(pixels)


def load(folder, size=4, channels=3, **options):
    told = []
    images = load_images(folder, size, channels, report=told.append, **options)
    return images, told


def first(folder, *args, **options):
    images, told = load(folder, *args, **options)
    assert not told, told
    return images[0]


def as_tensor(image, size=4):
    pixels = np.asarray(image.convert("RGB").resize((size, size)))
    return torch.from_numpy(pixels.copy()).movedim(-1, 0).float() / 255


def assert_close(images, expected, tolerance=1e-6):
    torch.testing.assert_close(images, expected.expand_as(images), rtol=0, atol=tolerance)


# Upright and opaque


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_of_cameras(tmp_path, orientation, suffix):
    transpose = Image.Transpose
    turned = {  # what a camera stores of an upright picture, by the tag that tells
        1: [], 2: [transpose.FLIP_LEFT_RIGHT], 3: [transpose.ROTATE_180],
        4: [transpose.FLIP_TOP_BOTTOM], 5: [transpose.TRANSPOSE], 6: [transpose.ROTATE_90],
        7: [transpose.TRANSVERSE], 8: [transpose.ROTATE_270],
    }[orientation]  # fmt: skip
    image = picture()
    for how in turned:
        image = image.transpose(how)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}
    image.save(tmp_path / f"a.{suffix}", exif=exif, **lossless.get(suffix, {}))
    assert_close(first(tmp_path), as_tensor(picture()), 0.06 if suffix == "jpg" else 1e-6)


def test_exif_that_is_damaged_does_not_matter(tmp_path):
    picture().save(tmp_path / "a.png", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff")
    assert_close(first(tmp_path), as_tensor(picture()))


def transparent(mode):
    """Left half opaque and grey 51; right half transparent, with a hidden grey of 204."""
    grey = np.full((4, 4), 51, dtype=np.uint8)
    grey[:, 2:] = 204
    alpha = np.where(grey == 51, 255, 0).astype(np.uint8)
    if mode == "LA":
        return Image.fromarray(np.stack([grey, alpha], -1), "LA"), {}
    if mode == "RGBA":
        return Image.fromarray(np.stack([grey, grey, grey, alpha], -1), "RGBA"), {}
    if mode == "P":
        image = Image.fromarray((grey == 204).astype(np.uint8), "P")
        image.putpalette([51, 51, 51, 204, 204, 204])
        return image, {"transparency": 1}
    if mode == "PA":  # a palette with a transparency of each entry
        image = Image.fromarray((grey == 204).astype(np.uint8), "P")
        image.putpalette([51, 51, 51, 204, 204, 204])
        return image, {"transparency": bytes([255, 0])}
    if mode == "RGB":
        return Image.fromarray(grey).convert("RGB"), {"transparency": (204, 204, 204)}
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257), {"transparency": 204 * 257}
    return Image.fromarray(grey), {"transparency": 204}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "L", "RGB", "I;16"])
def test_transparency_shows_the_background(tmp_path, mode, channels):
    image, more = transparent(mode)
    image.save(tmp_path / "a.png", **more)
    for options, value in (
        ({}, 1.0),
        ({"background": "black"}, 0.0),
        ({"background": "#333"}, 0.2),
    ):
        pixels = first(tmp_path, 4, channels, **options)
        assert pixels.shape == (channels, 4, 4)
        assert_close(pixels[:, :, :2], torch.tensor(0.2))
        assert_close(pixels[:, :, 2:], torch.tensor(value))


def test_half_transparent_pixels_and_colors_behind_them(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 51)).save(tmp_path / "a.png")
    expected = torch.tensor([0.2, 0.8, 0.0]).view(3, 1, 1)
    assert_close(first(tmp_path, background="lime"), expected, 0.5 / 255)


# Modes and kinds


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"), ("1", "tif"), ("1", "bmp"), ("L", "png"), ("L", "jpg"), ("P", "gif"),
        ("P", "png"), ("RGB", "bmp"), ("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg"),
        ("YCbCr", "tif"), ("RGB", "webp"), ("RGB", "tga"), ("RGB", "ppm"), ("1", "pbm"),
        ("RGB", "jp2"), ("RGB", "avif"), ("I;16", "png"), ("F", "tif"),
    ],
)  # fmt: skip
def test_every_mode(tmp_path, mode, suffix):
    image = Image.new("RGB", (8, 8), WHITE if mode in ("1", "I;16", "F") else (90, 90, 90))
    if mode in ("I;16", "F"):
        values = np.ones((8, 8)) if mode == "F" else np.full((8, 8), 65535)
        image = Image.fromarray(values.astype(np.float32 if mode == "F" else np.uint16))
    else:
        image = image.quantize() if mode == "P" else image.convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    value = 1.0 if mode in ("1", "I;16", "F") else 90 / 255
    for channels in (1, 3):
        pixels = first(tmp_path, 4, channels)
        assert pixels.shape == (channels, 4, 4) and pixels.dtype == torch.float32
        assert_close(pixels, torch.tensor(value), 0.02)


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_the_first_of_several_frames(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, GREEN, BLUE)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    images, told = load(tmp_path)
    assert_close(images[0], torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1), 0.01)
    assert told == [f"{tmp_path}: of 1 files with several frames the first is taken"]


def test_suffixes_in_any_case(tmp_path):
    for name in ("a.PNG", "b.JpG", "c.JPEG", "d.Tif"):
        picture().save(tmp_path / name)
    picture().save(tmp_path / "e", format="png")
    (tmp_path / "f.csv").write_text("a,b")
    images, told = load(tmp_path)
    assert len(images) == 4
    assert told == [
        f"{tmp_path}: 1 files of another kind (.csv) left out",
        f"{tmp_path}: 1 files of another kind (no suffix) left out",
    ]


# Files that cannot be used


def png(**options):
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, "png", **options)
    return buffer.getvalue()


def jpeg():
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "jpeg")
    return buffer.getvalue()


def changed(data, at):
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


DAMAGED = {
    "is empty (0 bytes)": ("a.png", b""),
    "is no image": ("a.png", b"this is text"),
    "truncated": ("a.jpg", jpeg()[:900]),
    "unrecognized data": ("a.jpg", jpeg()[:30] + b"\x00" * 400),
    "": ("a.png", changed(png(), 60)),
    "No such file": ("a.png", None),
}


@pytest.mark.parametrize("reason", DAMAGED)
def test_damaged_files_are_named_and_skipped(tmp_path, reason):
    name, data = DAMAGED[reason]
    file = tmp_path / name
    os.symlink(tmp_path / "nowhere.png", file) if data is None else file.write_bytes(data)
    picture().save(tmp_path / "b.png")
    counts = Counter()
    images, told = load(tmp_path, counts=counts)
    assert len(images) == 1 and counts == {"images_skipped": 1}
    assert len(told) == 1 and told[0].startswith(f"{file}: ") and "\n" not in told[0]
    assert told[0].endswith("(image skipped)")
    assert reason in told[0] or reason == "unrecognized data"
    with pytest.raises(ValueError, match=f"^{file}: ") as caught:
        load(tmp_path, fail_on_bad_image=True)
    assert "skipped" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    os.symlink(tmp_path / "b.png", tmp_path / "b.png")
    picture().save(tmp_path / "c.png")
    images, told = load(tmp_path)
    assert len(images) == 1 and len(told) == 2
    assert told[0] == f"{tmp_path / 'a.png'}: is no regular file (image skipped)"
    assert told[1].startswith(f"{tmp_path / 'b.png'}: Too many levels of symbolic links")


def test_every_cut_of_a_file_is_survived(tmp_path):
    data = {"a.png": png(), "b.jpg": jpeg()}
    for kind in ("gif", "webp", "tiff", "bmp"):
        buffer = io.BytesIO()
        picture(32, 32).save(buffer, kind)
        data[f"c.{kind}"] = buffer.getvalue()
    picture().save(tmp_path / "good.png")
    generator = np.random.default_rng(0)
    for name, whole in data.items():
        for _ in range(15):
            cut = whole[: int(generator.integers(1, len(whole)))]
            wrong = changed(whole, int(generator.integers(0, len(whole))))
            for damaged in (cut, wrong):
                (tmp_path / name).write_bytes(damaged)
                images, _ = load(tmp_path)
                assert len(images) in (1, 2) and images.isfinite().all()
        (tmp_path / name).unlink()


def test_many_damaged_files_are_counted(tmp_path):
    for i in range(50):
        (tmp_path / f"{i:02}.png").write_bytes(b"text")
    picture().save(tmp_path / "good.png")
    counts = Counter()
    images, told = load(tmp_path, counts=counts)
    assert len(images) == 1 and len(told) == 21 and counts["images_skipped"] == 50
    assert told[-1] == f"{tmp_path}: 30 more images skipped"
    (tmp_path / "good.png").unlink()
    with pytest.raises(ValueError, match="no image can be used"):
        load(tmp_path)


def test_enormous_files_are_named_and_skipped(tmp_path):
    Image.new("1", (14000, 14000)).save(tmp_path / "a.png")
    Image.new("1", (10000, 10000)).save(tmp_path / "b.png")
    Image.new("1", (2000, 2000)).save(tmp_path / "c.png")
    limit = Image.MAX_IMAGE_PIXELS
    images, told = load(tmp_path)
    assert len(images) == 1
    assert told == [
        f"{tmp_path / name}: has more than {limit} pixels (--max-pixels) (image skipped)"
        for name in ("a.png", "b.png")
    ]
    assert len(load(tmp_path, max_pixels=10**8)[0]) == 2
    assert len(load(tmp_path, max_pixels=None)[0]) == 3
    assert limit == Image.MAX_IMAGE_PIXELS


# Folders


def test_links_are_followed_once(tmp_path):
    store, data = tmp_path / "store", tmp_path / "data"
    for name in ("cats", "dogs"):
        (store / name).mkdir(parents=True)
        picture().save(store / name / "0.png")
        picture().save(store / name / "1.png")
    data.mkdir()
    (data / "cats").symlink_to(store / "cats")
    (data / "dogs").mkdir()
    (data / "dogs" / "0.png").symlink_to(store / "dogs" / "0.png")
    images, told = load(data)
    assert len(images) == 3 and not told
    (data / "dogs" / "again").symlink_to(data)  # a loop
    (data / "more").symlink_to(store / "cats")  # and the same class twice
    (data / "dogs" / "2.png").symlink_to(store / "dogs" / "0.png")
    images, told = load(data)
    assert len(images) == 3
    assert told == [
        f"{data}: 2 links to folders that are there already left out",
        f"{data}: 1 links to images that are there already left out",
    ]
    (tmp_path / "all").symlink_to(data)
    assert len(load(tmp_path / "all")[0]) == 3


def test_nested_folders_in_the_order_of_their_paths(tmp_path):
    for i, name in enumerate(("a/b/0.png", "a/1.png", "c.png", "b/0.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 10 * i).save(tmp_path / name)
    images, _ = load(tmp_path, 4, 1)
    assert (images[:, 0, 0, 0] * 25.5).round().tolist() == [1, 0, 3, 2]


def test_hidden_files_are_left_out(tmp_path):
    (tmp_path / ".checkpoints").mkdir()
    picture().save(tmp_path / ".checkpoints" / "a.png")
    picture().save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"a resource fork")
    images, told = load(tmp_path)
    assert len(images) == 1 and told == [f"{tmp_path}: 2 hidden files or folders left out"]


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):  # root may read everything, so the system is made to refuse
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    images, told = load(tmp_path)
    assert len(images) == 1
    assert told == [f"{tmp_path / 'closed'}: Permission denied (folder skipped)"]


# Arrays


def saved(path, **arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        (array,) = arrays.values()
        np.save(path, array, allow_pickle=True)
    return path


IMAGES = np.random.default_rng(0).integers(0, 255, (5, 6, 6), dtype=np.uint8)


def test_arrays_of_every_layout(tmp_path):
    expected = torch.from_numpy(IMAGES).unsqueeze(1) / 255
    file = tmp_path / "a.npy"
    for array in (IMAGES, np.asfortranarray(IMAGES), IMAGES[:, None], IMAGES[..., None],
                  IMAGES.astype(np.float64) / 255, (IMAGES / 255).astype(">f4"),
                  IMAGES[::-1][::-1]):  # fmt: skip
        images, told = load(saved(file, a=array))
        assert_close(images, expected, 1e-6)
        assert not told and images.is_contiguous()
    colors = np.stack([IMAGES] * 3, -1)
    assert_close(load(saved(file, a=np.asfortranarray(colors)))[0], expected)
    assert_close(
        load(saved(file, a=IMAGES > 99))[0], torch.from_numpy(IMAGES > 99)[:, None].float()
    )
    halves = load(saved(file, a=(IMAGES / 255).astype(np.float16)))[0]
    assert_close(halves, expected, 1e-3)
    upper = tmp_path / "B.NPY"
    file.rename(upper)
    assert len(load(upper)[0]) == 5


def test_archives_of_several_arrays(tmp_path):
    file = tmp_path / "a.npz"
    labels = np.arange(5)
    images, _ = load(saved(file, y=labels, x=IMAGES, names=np.array(["a"] * 5, dtype=object)))
    assert len(images) == 5
    saved(file, x_test=IMAGES, x_train=np.concatenate([IMAGES, IMAGES]), y=labels)
    with pytest.raises(ValueError, match=r"2 arrays of images \(x_test \(5, 6, 6\), .*image-array"):
        load(file)
    assert len(load(file, array="x_train")[0]) == 10
    with pytest.raises(ValueError, match="has no array 'x'; it has x_test, x_train, y"):
        load(file, array="x")
    with pytest.raises(ValueError, match=r"must be an array of images .*, got \(5,\)"):
        load(file, array="y")


def test_images_that_are_not_finite_are_named_and_skipped(tmp_path):
    pixels = IMAGES / 255
    pixels[1, 0, 0], pixels[3, 5, 5] = np.nan, np.inf
    file, counts = saved(tmp_path / "a.npy", a=pixels), Counter()
    images, told = load(file, counts=counts)
    assert len(images) == 3 and counts == {"images_skipped": 2}
    assert told == [
        f"{file}: image {i} holds values that are not finite (image skipped)" for i in (1, 3)
    ]
    with pytest.raises(ValueError, match=r"image 1 holds values that are not finite$"):
        load(file, fail_on_bad_image=True)
    with pytest.raises(ValueError, match="no image can be used"):
        load(saved(file, a=pixels * np.nan))


def written(path, data):
    path.write_bytes(data)
    return path


def bytes_of(kind):
    buffer = io.BytesIO()
    np.savez(buffer, a=IMAGES) if kind == "npz" else np.save(buffer, IMAGES)
    return buffer.getvalue()


OBJECTS = np.array([np.zeros((2, 2)), np.zeros((3, 3))], dtype=object)
RECORDS = np.zeros(5, dtype=[("x", "u1"), ("y", "f4")])
WRONG = {
    "empty": (lambda p: written(p / "a.npy", b""), r"a.npy is empty \(0 bytes\)$"),
    "empty archive": (lambda p: written(p / "a.npz", b""), r"a.npz is empty \(0 bytes\)$"),
    "cut": (lambda p: written(p / "a.npy", bytes_of("npy")[:150]), "is damaged: its end is miss"),
    "cut header": (lambda p: written(p / "a.npy", bytes_of("npy")[:20]), "is damaged: its end"),
    "cut archive": (lambda p: written(p / "a.npz", bytes_of("npz")[:200]), "is damaged: its end"),
    "changed archive": (lambda p: written(p / "a.npz", changed(bytes_of("npz"), 250)), "damaged"),
    "text": (lambda p: written(p / "a.npy", b"a text"), r"a.npy is no file of NumPy \(.npy, .npz"),
    "objects": (lambda p: saved(p / "a.npy", a=OBJECTS), "holds Python objects: save one array"),
    "objects in an archive": (lambda p: saved(p / "a.npz", a=OBJECTS), "holds Python objects"),
    "strings": (lambda p: saved(p / "a.npy", a=np.array([["a"]])), r"got \(1, 1\) of <U1"),
    "records": (lambda p: saved(p / "a.npy", a=RECORDS), r"got \(5,\) of \[\('x', 'u1'\)"),
    "complex": (lambda p: saved(p / "a.npy", a=IMAGES * 1j), r"of complex128$"),
    "a number": (lambda p: saved(p / "a.npy", a=np.array(3.0)), r"must be .* images .*, got \(\)$"),
    "one image": (lambda p: saved(p / "a.npy", a=IMAGES[0]), r"got \(6, 6\)$"),
    "videos": (lambda p: saved(p / "a.npy", a=IMAGES[None, None]), r"got \(1, 1, 5, 6, 6\)$"),
    "no image": (lambda p: saved(p / "a.npy", a=IMAGES[:0]), r"got \(0, 6, 6\)$"),
    "no array": (lambda p: saved(p / "a.npz"), "got nothing$"),
    "a table": (lambda p: written(p / "a.csv", b"a,b"), r"a.csv: expected a folder .*got a .csv$"),
    "a picture": (lambda p: written(p / "a.PNG", png()), "expected a folder .* got one image$"),
    "no suffix": (lambda p: written(p / "a", b"x"), "expected a folder .* got a file$"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_cannot_be_used_in_plain_words(tmp_path, name):
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        load(make(tmp_path))
    text = str(caught.value)
    assert text.startswith(str(tmp_path)) and "\n" not in text
    assert "pickle" not in text and "unsafe" not in text


# Options and processors


def test_options():
    ImageOptions().check()
    for options, message in (
        ({"image_size": 0}, "--image-size must be at least 1, got 0"),
        ({"max_pixels": 0}, "--max-pixels must be at least 1"),
        ({"background": "#12"}, "--background: expected a color such as white or #rrggbb"),
        ({"background": ""}, "--background: expected a color"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageOptions(**options).check()
    assert ImageOptions().max_pixels == Image.MAX_IMAGE_PIXELS


MEAN, SPREAD = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]


def processor():
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 6, "width": 6}, image_mean=MEAN, image_std=SPREAD)


def test_the_image_processor_is_applied(tmp_path):
    mean, spread = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, SPREAD))
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16)).save(tmp_path / "b.png")
    Image.new("L", (5, 9), 255).save(tmp_path / "c.png")
    images, told = load(tmp_path, None, 1, processor=processor())
    assert images.shape == (3, 3, 6, 6) and not told
    assert_close(images, (1 - mean) / spread)
    file = saved(tmp_path / "a.npy", a=np.full((2, 6, 6), 255, dtype=np.uint8))
    assert_close(load(file, processor=processor())[0], (1 - mean) / spread)
    saved(file, a=np.full((2, 6, 6), 3.0))
    with pytest.raises(ValueError, match=r"takes 3 channels, or grey .* 0 to 1, got 1 from 3"):
        load(file, processor=processor())


def test_a_processor_of_grey_images(tmp_path):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    grey = ViTImageProcessorPil(size={"height": 6, "width": 6}, image_mean=[0.5], image_std=[0.25])
    Image.new("RGB", (9, 9), WHITE).save(tmp_path / "a.png")
    images, _ = load(tmp_path, processor=grey)
    assert images.shape == (1, 1, 6, 6)
    assert_close(images, torch.tensor(2.0))
    file = saved(tmp_path / "a.npy", a=np.zeros((2, 6, 6), dtype=np.uint8))
    assert_close(load(file, processor=grey)[0], torch.tensor(-2.0))
