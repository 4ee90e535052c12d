#!/usr/bin/env python3
"""Draw the verdicts on all claims for the home page, from results/mini, and keep in the picture what it shows.

    python tools/verdict_picture.py            # writes nbs/images/verdicts.png
    python tools/verdict_picture.py --check    # exits with 1 if the picture shows something else than the results say
"""
import argparse, io, json, sys
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from libmoe_nb.core.files import atomic_path
from libmoe_nb.paper.newer import all_claims, labelled
from libmoe_nb.paper.pages import kept_results

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT/'nbs'/'images'/'verdicts.png'

def shown(picture=PICTURE): return json.loads(Image.open(picture).text['Description'])

def verdicts():
    claims = labelled(all_claims(kept_results(start=ROOT)))
    said = [f"{v}, corrected: {c}" if c else v for v, c in zip(claims.verdict, claims.corrected)]
    return claims, dict(zip(claims.claim, said))

def draw(claims, said):
    from libmoe_nb.plots.verdicts import plot_verdicts
    fig, raw, out, info = plot_verdicts(claims, 2, 5.4), io.BytesIO(), io.BytesIO(), PngInfo()
    fig.savefig(raw, dpi=200)
    info.add_text('Description', json.dumps(said))
    picture = Image.open(raw).convert('P', palette=Image.Palette.ADAPTIVE, colors=64)
    picture.save(out, 'PNG', pnginfo=info, optimize=True)
    with atomic_path(PICTURE) as new: new.write_bytes(out.getvalue())

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--check', action='store_true', help='draw nothing')
    args = p.parse_args()
    claims, said = verdicts()
    if not args.check: draw(claims, said)
    if shown() != said: print('the picture shows other verdicts than results/mini: python tools/verdict_picture.py')
    return int(shown() != said)

if __name__ == '__main__': sys.exit(main())
