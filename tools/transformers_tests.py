"""Run transformers' own model tests on our models: `python tools/transformers_tests.py [pytest arguments]`.

The wheel of transformers has no tests, its source archive has. pip fetches the archive of the installed version into a
cache folder outside of the repository, and the tests run from a temporary folder. `tools/transformers_cases.py` says
which models they get, and which tests differ by design.
"""
import os, re, subprocess, sys, tarfile, tempfile
from importlib.metadata import version
from pathlib import Path

here, halves = Path(__file__).parent, ('Common', 'Distributed')
missing = {  # what the tests import and the archive lacks
    'generation/test_utils.py': 'class GenerationTesterMixin: pass',
    'exporters/test_export.py': 'class ExportTesterMixin: pass',
    'distributed_testing_utils.py': (here/'transformers_processes.py').read_text(),
}

# why a test may be skipped; anything else is a failure
allowed = [
    # what this machine lacks
    r'test requires (accelerator|multiple accelerators|deepspeed|Flash Attention.*|the kernels library|MPS)',
    r'test is slow', r'(T|t)est requires torchao',
    r'Need at least \d FSDP workers',
    # other kinds of model
    r'Not a prioritized model', r'not in MODEL_MAPPING', r'has no `base_model_class`', r'No sequence-to-sequence',
    r'(not|is not) (a )?composite', r'does not support SDPA',
    r'Model does not have position embeddings', r'sliding window', r'No conversion found',
    r'Do not take a cache as input',
    # our experts have kernels of their own
    r'no sparse experts', r'does not support (grouped|batched)_mm',
    r'has no _keep_in_fp32_modules', r'No `_keep_in_fp32_modules_strict` defined',   # recipes without an expert bias
    r'has no `output_router_logits` in its config',                                   # the dense recipe
    # experts are not split over processes
    r'expert parallel plan', r'Not an MoE model',
    # said at the test, in transformers_cases.py
    r'By design: ', r'Upstream: ',
]

def archive(v):
    "The source archive of transformers `v`"
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home()/'.cache')/'libmoe-nb'
    path = cache/f'transformers-{v}.tar.gz'
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as d:
            subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', ':all:', '-d', d,
                            f'transformers=={v}'], check=True)
            next(Path(d).glob('*.tar.gz')).rename(path)
    return path

def unpack(path, folder):
    "The tests of the archive as a package `tests` in `folder`, with what they lack"
    with tarfile.open(path) as t:
        for m in t:
            if re.fullmatch(r'[^/]+/tests/[^/]+\.py', m.name):
                (folder/'tests'/Path(m.name).name).write_bytes(t.extractfile(m).read())
    for name, text in missing.items():
        (folder/'tests'/name).parent.mkdir(exist_ok=True)
        (folder/'tests'/name).write_text(text + '\n')
    for d in ('', 'generation', 'exporters'): (folder/'tests'/d/'__init__.py').touch()

# ---- as a plugin of pytest
reasons = {}

def pytest_runtest_logreport(report):
    if report.skipped and not hasattr(report, 'wasxfail'):
        reasons.setdefault(report.longrepr[2].removeprefix('Skipped: '), report.nodeid)

def pytest_sessionfinish(session, exitstatus):
    unknown = {why: test for why, test in reasons.items() if not any(re.search(a, why) for a in allowed)}
    for why, test in unknown.items(): print(f'\nskipped for a reason that is not on the list: {test}: {why}')
    if unknown: session.exitstatus = 1

def pytest_collection_modifyitems(items): items.sort(key=lambda i: i.nodeid.split('::')[1])

def main(args):
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        (folder/'tests').mkdir()
        unpack(archive(version('transformers')), folder)
        (folder/'test_models.py').write_text('from transformers_cases import *\n')
        env = os.environ | dict(PYTHONPATH=os.pathsep.join([d, str(here), str(here.parent)]), OMP_NUM_THREADS='1',
                                HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', TRANSFORMERS_VERBOSITY='error')
        run = [sys.executable, '-m', 'pytest', '-q', '-p', 'transformers_tests', '-p', 'no:cacheprovider', '-W',
               'ignore', '--tb=short', '--color=no', '-rfE', 'test_models.py']
        chosen = [args] if args else [['-k', half] for half in halves]
        jobs = [subprocess.Popen([*run, *some], cwd=d, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 text=True) for some in chosen]
        outs = [j.communicate()[0] for j in jobs]
        for j, out in zip(jobs, outs):
            print('\n'.join(out.splitlines()[-1:] if j.returncode == 0
                            else [*out.splitlines()[-200:], f'exit status {j.returncode}']))
        return int(any(j.returncode for j in jobs))

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
