"""The requirements of settings.ini without upper bounds: what `pip install --upgrade -r` takes for the newest versions.

Names of extras may be given; by default dev and demo.
"""
import re, sys
from configparser import ConfigParser
from pathlib import Path

def newest(*extras):
    config = ConfigParser(delimiters=['='])
    config.read(Path(__file__).resolve().parent.parent/'settings.ini', encoding='utf-8')
    keys = ['requirements', *(f'{e}_requirements' for e in extras or ('dev', 'demo'))]
    for line in [line.strip() for k in keys for line in config['DEFAULT'][k].splitlines() if line.strip()]:
        requirement, *marker = line.split(';')
        yield ';'.join([re.sub(r',?\s*<=?\s*[\w.]+', '', requirement), *marker])

if __name__ == '__main__': print('\n'.join(newest(*sys.argv[1:])))
