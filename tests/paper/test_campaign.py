"The campaign: its list of runs, a small piece made again to the bit, an interruption, and names that nobody knows."
import json, re, shutil
import pandas as pd, pytest, torch
from libmoe_nb.core.files import write_json
from libmoe_nb.experiments.compare import compare
from libmoe_nb.experiments.run import run_name
from libmoe_nb.moe.config import recipes
from libmoe_nb.paper.campaign import chosen_groups, claims_of, figure_names, group_table, plan_campaign, scales
from libmoe_nb.paper.controls import CampaignRun, control_recipes, control_titles
from libmoe_nb.paper.measures import measures_for
from libmoe_nb.paper.results import read_results, reproduce, results_folder
from libmoe_nb.paper.verdicts import claims, verdict_table

told_by_the_clock = 'speed.csv', 'runs.json'

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp('made')
    return out, reproduce('table10', 'tiny', out, jobs=1)

def tables(out):
    folder = results_folder(out, 'tiny', 'table10')
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in told_by_the_clock}

def test_every_claim_has_runs():
    assert {*claims} == {n for g in chosen_groups('mini') for n in claims_of(g)}

def test_the_list_fits_into_six_hours_of_two_cores():
    assert group_table('mini').hours.sum() / 2 < 6

def test_runs_have_names_of_their_own(tmp_path):
    c = plan_campaign('fig3,table10,fig17', 'tiny', tmp_path)
    names = [r.name for _, r in c.runs]
    assert len({*names}) == len(names)

@pytest.mark.long
def test_a_small_piece_is_made_again_to_the_bit_though_it_was_interrupted(made, tmp_path):
    def stop(event, name=None, **facts):
        if event == 'finish': raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): reproduce('table10', 'tiny', tmp_path, jobs=1, progress=stop)
    done = [*(tmp_path/'runs').glob('*/result.json')]
    assert len(done) == 1
    time = done[0].stat().st_mtime_ns
    reproduce('table10', 'tiny', tmp_path, jobs=1)
    here, there = tables(made[0]), tables(tmp_path)
    assert {'perplexity.csv', 'change_rate.csv', 'ablation.csv', 'accuracy.csv', 'perturbation.csv'} <= {*here}
    assert done[0].stat().st_mtime_ns == time and here == there

def test_runs_of_compare_are_found_finished(made, tmp_path):
    s = scales['tiny']
    compare('smoe', seeds=[0], preset='tiny', out=tmp_path/'runs', threads=1, progress=None, traces=s.traces,
            **s.settings, **s.reading)
    c = plan_campaign('table10', 'tiny', tmp_path/'new', look_in=[tmp_path/'runs'])
    assert [r.config['recipe'] for _, r in c.runs if r.finished] == ['smoe']
    assert made[0].joinpath('runs', next(r.name for _, r in c.runs if r.finished)).is_dir()

def test_evidence_has_the_columns_that_claims_read(made):
    e = read_results(results_folder(made[0], 'tiny', 'table10'))
    wanted = dict(perplexity='step progress variant', accuracy='task variant tau intervention',
                  change_rate='progress variant',
                  saturation='progress k', allocation_entropy='domain', weight_entropy='group', margin='depth variant',
                  output_similarity='depth',
                  strongest_pairs='progress', perturbation='intervention', imbalance='variant', speed='')
    for name, columns in wanted.items():
        assert {'regime', 'recipe', 'seed', 'value', *columns.split()} <= {*e.tables[name]}, name
    for name, t in e.tables.items(): assert pd.to_numeric(t.value, errors='coerce').notna().any(), name

def test_verdicts_follow_from_the_files(made):
    out, told = made
    chosen = [claims[n] for n in told.claim]
    again = verdict_table(read_results(results_folder(out, 'tiny', 'table10')), chosen)
    assert again.verdict.tolist() == told.verdict.tolist() and 'not run' in {*told.verdict}

def test_runs_json_says_what_made_it(made):
    about = json.loads((results_folder(made[0], 'tiny', 'table10')/'runs.json').read_text())
    assert about['command'] == 'libmoe reproduce --only table10 --scale tiny' and not about['missing']
    assert {r['seed'] for r in about['runs']} == {0, 1}
    assert {'torch', 'libmoe_nb', 'transformers'} <= {*about['versions']}

def test_only_selects():
    assert {g.name for g in chosen_groups('mini', 'fig10')} == {f'init {s:g}' for s in (.005, .02, .04, .06, .2, 1.)}
    assert 'vision' not in {g.name for g in chosen_groups('mini', 'table10,fig3')}
    assert 'vision' in {g.name for g in chosen_groups('mini', ['Fig. 5'])}

@pytest.mark.parametrize('args, words', [((None, 'huge'), 'unknown scale'),
                                         (('fig22x', 'mini'), "did you mean 'fig22'"),
                                         (('table3', 'mini'), 'unknown figure'), (('fig5', 'tiny'), 'runs for')])
def test_unknown_names_are_told_kindly(tmp_path, args, words):
    with pytest.raises(ValueError, match=re.escape(words)): reproduce(*args, out=tmp_path/'o')
    assert not (tmp_path/'o').exists()

def test_figures_of_a_claim_are_read():
    assert figure_names('fig. 15, 20 to 25') == ['fig15', *(f'fig{i}' for i in range(20, 26))]

def test_controls_are_recipes_in_the_block_alone():
    plan_campaign('fig3', 'tiny', '/nonexistent')
    assert not {*control_titles} & {*recipes}

def test_every_group_of_the_list_makes_its_models(tmp_path):
    "A run whose model cannot be made would only be known after hours of others."
    c, seen, ids = plan_campaign(None, 'mini', tmp_path), set(), torch.arange(8)[None]
    for g, r in c.runs:
        if (key := (g.name, r.config['recipe'])) in seen or r.config.get('start'): continue
        seen.add(key)
        with control_recipes(), torch.no_grad():
            run = CampaignRun(r.folder, r.config, r.data, r.options, info=r.info)
            assert run.learner().model(input_ids=ids).logits.isfinite().all(), key
    assert {n for _, n in seen} >= {'hash', 'random_fixed', 'smoe', 'dense'}

def test_a_start_is_another_run_and_changes_the_shared_experts_alone(tmp_path):
    c = plan_campaign('fig3', 'tiny', tmp_path)
    by = {(g.variant, r.config['recipe'], r.config['seed']): r for g, r in c.runs}
    base, started = by['base', 'sharede_v2', 0], by['shared_upcycled', 'sharede_v2', 0]
    assert base.name != started.name and {k: v for k, v in started.config.items() if k != 'start'} == base.config
    assert [g.variant for g, _ in c.levels()[-1]] == ['shared_upcycled'] * 2
    assert started.donor == by['donor', 'dense', 0].folder

def test_experts_are_ablated_for_three_seeds_of_the_recipes_as_they_are():
    base, more = (g for g in chosen_groups('mini') if g.name in ('base', 'more seeds'))
    assert 'ablation' in measures_for(base, 2) and 'ablation' not in measures_for(more, 3)

def test_a_run_counts_on_whatever_device_it_was_trained(made, tmp_path):
    "A cluster trains, a laptop measures: the run on a GPU is taken, with its own name"
    c = plan_campaign('table10', 'tiny', tmp_path, device='cpu')
    run = c.runs[0][1]
    there = dict(run.config, device='cuda')
    folder = tmp_path/'runs'/run_name(there)
    shutil.copytree(made[0]/'runs'/run.name, folder)
    write_json(folder/'config.json', dict(run=there))
    again = plan_campaign('table10', 'tiny', tmp_path, device='cpu')
    assert again.runs[0][1].folder == folder and again.runs[0][1].finished and not again.runs[1][1].finished
    reproduce('table10', 'tiny', tmp_path, train=False)
    row, = json.loads((results_folder(tmp_path, 'tiny', 'table10')/'runs.json').read_text())['runs']
    assert row['device'] == 'cuda' and row['name'] == folder.name
