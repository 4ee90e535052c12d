"Pictures of every kind are read right or refused by name, and never black by mistake."

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFile

from libmoe_nb.data.images import BadImage, image_digest, pad_to_square, read_image


def card(mode='RGB', size=(24, 16)):
    "Left half white, right half red, with a dark corner at the top left"
    im = Image.new('RGB', size, 'white')
    d = ImageDraw.Draw(im)
    d.rectangle([size[0] // 2, 0, *size], fill=(220, 40, 30))
    d.rectangle([0, 0, 5, 5], fill=(20, 20, 60))
    return im.quantize(8) if mode == 'P' else im.convert(mode)


def saved(im, kind, **kw):
    im.save(b := io.BytesIO(), kind, **kw)
    return b.getvalue()


def orientation(n):
    exif = Image.Exif()
    exif[0x0112] = n
    return exif


# what turns the upright picture into the one that a phone stores under this number
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
other = Image.new('RGB', (24, 16), 'lime')
KINDS = dict(
    png=saved(card(), 'PNG'),
    jpeg=saved(card(), 'JPEG', quality=98, subsampling=0),
    webp=saved(card(), 'WEBP', lossless=True),
    bmp=saved(card(), 'BMP'),
    tiff=saved(card(), 'TIFF'),
    cmyk=saved(card('CMYK'), 'JPEG', quality=98),
    cmyk_tiff=saved(card('CMYK'), 'TIFF'),
    palette=saved(card('P'), 'PNG'),
    gif=saved(card('P'), 'GIF'),
    film_gif=saved(card(), 'GIF', save_all=True, append_images=[other]),
    film_png=saved(card(), 'PNG', save_all=True, append_images=[other]),
    film_webp=saved(card(), 'WEBP', lossless=True, save_all=True, append_images=[other]),
    ycbcr=card('YCbCr'),
    lab=card('LAB'),
    hsv=card('HSV'),
    **{f'phone_{n}': saved(card().transpose(t), 'PNG', exif=orientation(n)) for n, t in STORED.items()},
    phone_jpeg=saved(card().transpose(STORED[6]), 'JPEG', quality=98, subsampling=0, exif=orientation(6)),
)


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_is_the_same_picture(kind):
    got, want = np.asarray(read_image(KINDS[kind])).astype(int), np.asarray(card()).astype(int)
    assert got.shape == want.shape and abs(got - want).mean() < 8
    # its colours stand where they stood
    assert all(abs(got[y, x] - want[y, x]).max() < 60 for y, x in ((2, 2), (12, 4), (8, 20)))


GREY = np.linspace(0, 1, 24 * 16).reshape(16, 24)


@pytest.mark.parametrize(
    'name, im',
    [
        ('L', Image.fromarray((GREY * 255).astype(np.uint8))),
        ('sixteen bits', saved(Image.fromarray((GREY * 65_535).astype(np.uint16)), 'PNG')),
        ('sixteen bits, tiff', saved(Image.fromarray((GREY * 65_535).astype(np.uint16)), 'TIFF')),
        ('32 bits of 8', Image.fromarray((GREY * 255).astype(np.int32))),
        ('32 bits of 16', Image.fromarray((GREY * 65_535).astype(np.int32))),
        ('float of 1', Image.fromarray(GREY.astype(np.float32))),
        ('float of 255', Image.fromarray((GREY * 255).astype(np.float32))),
    ],
)
def test_deep_grey_is_neither_white_nor_black(name, im):
    got = np.asarray(read_image(im)).astype(int)
    assert got.shape == (16, 24, 3) and abs(got - (GREY * 255)[..., None]).max() <= 1.5


@pytest.mark.parametrize(
    'im',
    [
        Image.fromarray(np.full((4, 4), 100_000, np.int32)),
        Image.fromarray(np.full((4, 4), np.nan, np.float32)),
        Image.fromarray(np.full((4, 4), 1e9, np.float32)),
    ],
)
def test_grey_of_an_unknown_range_is_refused(im):
    with pytest.raises(BadImage, match='unknown range'):
        read_image(im)


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_what_is_transparent_lies_on_white(mode):
    im = Image.new('RGBA', (8, 8), (0, 0, 0, 0))
    im.putpixel((2, 2), (200, 10, 10, 255))
    got = np.asarray(
        read_image(
            saved(
                im.convert(mode), 'PNG', **(dict(transparency=im.convert('P').getpixel((0, 0))) if mode == 'P' else {})
            )
        )
    )
    assert got[0, 0].tolist() == [255] * 3 and got[2, 2].tolist() != [255] * 3


@pytest.mark.parametrize('size', [(1, 1), (1, 200), (200, 1), (3, 3)])
def test_tiny_pictures(size):
    im = read_image(saved(Image.new('RGB', size, (9, 200, 9)), 'PNG'))
    assert im.size == size and im.getpixel((0, 0)) == (9, 200, 9)
    assert pad_to_square(im).size == (max(size),) * 2


@pytest.mark.parametrize('kind', ['png', 'jpeg', 'webp', 'tiff', 'gif', 'cmyk'])
@pytest.mark.parametrize('careless', [False, True])
def test_half_a_file_is_refused_whatever_is_switched_on(kind, careless, monkeypatch):
    "Many programs switch this on, and the rest of the picture is grey or black"
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', careless)
    big = dict(png='PNG', jpeg='JPEG', webp='WEBP', tiff='TIFF', gif='GIF', cmyk='JPEG')[kind]
    rng = np.random.default_rng(0)
    im = Image.fromarray(rng.integers(0, 255, (90, 90, 3), dtype=np.uint8)).convert('CMYK' if kind == 'cmyk' else 'RGB')
    whole = saved(im, big)
    with pytest.raises(BadImage) as e:
        read_image(whole[: len(whole) // 2])
    assert e.value.kind == 'cannot be read' and ImageFile.LOAD_TRUNCATED_IMAGES == careless


def test_kinds_of_refusal(tmp_path):
    def kind(source, **kw):
        with pytest.raises(BadImage) as e:
            read_image(source, **kw)
        return e.value.kind

    (tmp_path / 'text.png').write_text('no picture')
    assert kind(tmp_path / 'none.png') == kind(dict(bytes=None, path=str(tmp_path / 'none.png'))) == 'is missing'
    assert kind(tmp_path / 'text.png') == kind(b'') == kind(tmp_path) == kind(dict()) == kind(7) == 'cannot be read'
    assert kind(card(), max_pixels=10) == 'is too large'
    # of 40,000 x 40,000 pixels, in a few bytes
    header = bytearray(saved(Image.new('1', (8, 8)), 'BMP'))
    header[18:26] = (40_000).to_bytes(4, 'little') * 2
    assert kind(bytes(header)) in ('is too large', 'cannot be read')


def test_a_line_of_pixels_does_not_become_a_terabyte():
    with pytest.raises(BadImage) as e:
        pad_to_square(Image.new('RGB', (60_000, 2)))
    assert e.value.kind == 'is too large'


def test_a_digest_is_of_the_bytes(tmp_path):
    (p := tmp_path / 'a.png').write_bytes(KINDS['png'])
    assert (
        len(
            {
                image_digest(s)
                for s in (
                    KINDS['png'],
                    p,
                    str(p),
                    dict(bytes=KINDS['png']),
                    dict(path=str(p)),
                    lambda: dict(bytes=KINDS['png']),
                )
            }
        )
        == 1
    )
    assert image_digest(KINDS['png']) != image_digest(KINDS['bmp'])
    assert image_digest(card()) == image_digest(card()) != image_digest(card(size=(16, 24)))
    with pytest.raises(BadImage):
        image_digest(tmp_path / 'none.png')
