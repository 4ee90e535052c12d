"What `pyproject.toml` leaves dynamic: metadata and requirements from `settings.ini`, the version from the package."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
init = (root/cfg['lib_path']/'__init__.py').read_text(encoding='utf-8')

def lines(key): return [line.strip() for line in cfg.get(key, '').splitlines() if line.strip()]

setup(
    version=re.search(r'^__version__\s*=\s*[\'"]([^\'"]+)', init, re.M).group(1),
    description=cfg['description'], author=cfg['author'], keywords=cfg['keywords'].split(),
    classifiers=[f"Development Status :: {cfg['status']}", f"Intended Audience :: {cfg['audience']}",
                 'Topic :: Scientific/Engineering :: Artificial Intelligence', 'Programming Language :: Python :: 3',
                 *(f'Programming Language :: Python :: {v}' for v in cfg['python_versions'].split())],
    packages=find_namespace_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']), include_package_data=True,
    install_requires=lines('requirements'),
    extras_require={k.removesuffix('_requirements'): lines(k) for k in cfg if k.endswith('_requirements')},
    entry_points={'console_scripts': lines('console_scripts'), 'nbdev': lines('nbdev_entry'),
                  'lmms_eval.models': lines('lmms_entry')})
