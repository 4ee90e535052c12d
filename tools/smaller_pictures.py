"""Pictures that notebooks have stored, on a palette: a third of the bytes, and no difference to see.

python tools/smaller_pictures.py NOTEBOOK...
"""
import io, json, sys
from base64 import b64decode, b64encode
from pathlib import Path
from PIL import Image

def smaller(data, colours=128):
    "A PNG in base64 on a palette, where that makes it smaller"
    im = Image.open(io.BytesIO(b64decode(data))).convert('RGBA')
    flat = Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')
    flat.quantize(colours, dither=Image.Dither.NONE).save(out := io.BytesIO(), 'PNG', optimize=True)
    new = b64encode(out.getvalue()).decode()
    return new if len(new) < .8 * len(data) else data.strip()

def main(*paths):
    for p in map(Path, paths):
        text = p.read_text(encoding='utf-8')
        nb = json.loads(text)
        for o in (o for c in nb['cells'] for o in c.get('outputs', [])):
            if 'image/png' in o.get('data', {}): o['data']['image/png'] = smaller(o['data']['image/png'])
        new = json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n'
        p.write_text(new, encoding='utf-8')
        print(f'{p}: {len(text) / 1e6:.2f} -> {len(new) / 1e6:.2f} MB')

if __name__ == '__main__': main(*sys.argv[1:])
