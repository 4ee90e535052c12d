"""What is worth keeping of a folder of `libmoe vlm compare`: tables, answers with pictures, maps. Under one MB.

python tools/vision_results.py FOLDER OUT

OUT is written anew. Models that are not finished are left out, so that the same line may run again later.
"""
import json, pandas as pd, platform, shutil, sys, torch, transformers
from pathlib import Path
from libmoe_nb import __version__
from libmoe_nb.analysis.patches import patch_content, patch_information, trace_images
from libmoe_nb.core.files import read_json, write_json
from libmoe_nb.core.machine import use_threads
from libmoe_nb.data.conversations import ConversationData, read_conversations
from libmoe_nb.evaluation.answers import read_answers
from libmoe_nb.experiments.vision_report import chosen_answers
from libmoe_nb.models.asking import image_tensor, load_vision_language
from libmoe_nb.models.towers import image_places
from libmoe_nb.moe.config import own_recipes

mapped = 'smoe', 'sharede_v3', 'moe_plus_plus', 'xmoe', 'smoe_sigmoid'   # the first three that there are
conditions = dict(own=1, shuffled=2, blank=4, none=1)                   # bits of a right answer

def finished(root):
    "Stages with a result, and last stages that have answered: (folder, configuration, result) in the order of training"
    found = [(p.parent, read_json(p.parent/'config.json')['run'], read_json(p))
             for p in root.glob('stages/*/result.json')]
    shared = {f.name: (f, c, r) for f, c, r in found if 'recipe' not in c}
    order, at = [], next(c for _, c, _ in found if 'recipe' in c)['start'].get('stage')
    while at: order, at = [shared[at], *order], shared[at][1]['start'].get('stage')
    names = ['dense', *own_recipes]
    last = [t for t in found if 'recipe' in t[1] and (t[0]/'answers'/'results.json').exists()]
    return order, sorted(last, key=lambda t: (not t[1].get('images', True), t[1]['seed'], names.index(t[1]['recipe'])))

def losses_of(folder, points=60):
    "Steps and losses, averaged over pieces of the training"
    log = pd.DataFrame([json.loads(l) for l in (folder/'log.jsonl').read_text().splitlines()])
    log = log[log.split == 'train'].drop_duplicates('step', keep='last')
    piece = (log.step - 1) * points // log.step.max()
    return log.groupby(piece)[['step', 'loss']].mean().round(4)

def stages_table(stages, out):
    rows, curves = [], []
    for f, c, r in stages:
        s = c['stage']
        rows.append(dict(stage=s['name'], recipe=c.get('recipe', ''), seed=c['seed'], images=c.get('images', True),
                         trained=' '.join(s['train']), experts=' '.join(s['experts']), data=s['data'],
                         scenes=c['data'].get('scenes'), batch_size=s['batch_size'], learning_rate=s['learning_rate'],
                         trained_parameters=r['trained'],
                         **{k: r[k] for k in ('steps', 'seconds', 'loss', 'parameters', 'active_parameters')}))
        if 'recipe' not in c or c['seed'] == 0: curves.append(losses_of(f).assign(
            stage=s['name'], recipe=c.get('recipe', '') if c.get('images', True) else 'question_only'))
    pd.DataFrame(rows).round(dict(seconds=1, loss=4)).to_csv(out/'stages.csv', index=False)
    pd.concat(curves)[['stage', 'recipe', 'step', 'loss']].to_csv(out/'losses.csv', index=False)
    gate = [dict(stage=r['stage'], attribute=a, **n) for _, _, r in stages for a, n in r.get('captions', {}).items()]
    pd.DataFrame(gate).to_csv(out/'gate.csv', index=False)

def answer_tables(last, out):
    "accuracies.csv, and right.csv: a row a question, a column a run, whose bits say when it was right"
    a = read_answers(*(f/'answers' for f, *_ in last))
    keys = ['model', 'seed', 'condition', 'group', 'subtask', 'kind']
    t = a.groupby(keys, sort=False).right.agg(['sum', 'size']).reset_index()
    t.rename(columns=dict(model='recipe', sum='right', size='n')).to_csv(out/'accuracies.csv', index=False)
    a['run'], a['bits'] = a.model + ':' + a.seed.astype(str), a.right * a.condition.map(conditions)
    bits = a.pivot_table(index='id', columns='run', values='bits', aggfunc='sum', sort=False)
    facts = a[a.condition == 'own'].drop_duplicates('id').set_index('id')[['subtask', 'group', 'kind']]
    facts.join(bits[[*dict.fromkeys(a.run)]].astype('Int64')).to_csv(out/'right.csv')
    return a.drop(columns=['run', 'bits'])

def examples(a, root, out, most=40):
    "Chosen questions with what the recipes say, and their pictures"
    own = a[(a.condition == 'own') & (a.seed == 0)]
    names, first = [*own.model.unique()], 'smoe' if 'smoe' in own.model.unique() else own.model.iloc[0]
    chosen = chosen_answers(own[own.model == first], most)[['id', 'image', 'group', 'subtask', 'question', 'answer']]
    said = own.pivot_table(index='id', columns='model', values='said', aggfunc='first')[names]
    other = a[(a.condition == 'shuffled') & (a.seed == 0) & (a.model == first)].set_index('id')[['shown', 'said']]
    chosen = chosen.join(said, on='id').join(other.add_prefix('shuffled_'), on='id')
    chosen.to_csv(out/'answers.csv', index=False)
    for n in {*chosen.image, *chosen.shuffled_shown}: shutil.copy(root/'test'/'images'/n, out/'images'/n)
    return [*chosen.image.unique()]

def maps(last, root, names, out, many=200):
    "Traces of some pictures, and what place and content tell about experts on more of them"
    found = {c['recipe']: f for f, c, _ in last if c['seed'] == 0 and c['recipe'] in mapped}
    one = {s.images[0].name: s for s in read_conversations(root/'test'/'conversations.json')[0]}
    rows = []
    for r in [r for r in mapped if r in found][:3]:
        model, processor = load_vision_language(found[r]/'model', device='cpu')
        data = lambda ns: ConversationData([one[n] for n in ns], processor.tokenizer, image_tensor(processor),
                                           image_places(model))
        trace_images(model, data(names), out/'maps'/r, recipe=r)
        more = trace_images(model, data([*one][:many]), out/'many', recipe=r)
        for part, t in more.items():
            content = patch_content(t)[0]
            for what, kw in dict(place=dict(labels='place'), colour=dict(labels=content, given='place')).items():
                rows.append(patch_information(t, **kw, shuffles=3, folds=10).assign(recipe=r, part=part, of=what))
    shutil.rmtree(out/'many', ignore_errors=True)
    if rows: pd.concat(rows).round(4).to_csv(out/'information.csv', index=False)

def main(root, out):
    use_threads(1)
    root, out = Path(root), Path(out)
    shared, last = finished(root)
    shutil.rmtree(out, ignore_errors=True)
    (out/'images').mkdir(parents=True)
    stages_table(shared + last, out)
    a = answer_tables(last, out)
    names = examples(a, root, out)
    maps(last, root, names[:12], out)
    runs = [dict(recipe=c['recipe'], seed=c['seed'], images=c.get('images', True)) for _, c, _ in last]
    write_json(out/'info.json', dict(
        commands=['libmoe vlm pretrain --preset mini-vlm', 'libmoe vlm compare --preset mini-vlm --more-seeds 2',
                  'python tools/vision_results.py vision results/mini-vlm'],
        stages=[f.name for f, *_ in shared + last], runs=runs,
        experts=next((c['experts'] for _, c, _ in last if c['experts']), {}),
        questions=int(a.id.nunique()), images=int(a.image.nunique()), seeds=sorted({r['seed'] for r in runs}),
        preset='mini-vlm', versions=dict(
                      libmoe_nb=__version__, torch=torch.__version__, transformers=transformers.__version__,
                      python=platform.python_version()), device='cpu'))
    size = sum(p.stat().st_size for p in out.rglob('*') if p.is_file())
    print(f'{len(shared)} shared stages, {len(last)} models, {size / 1e6:.2f} MB in {out}')

if __name__ == '__main__': main(*sys.argv[1:3])
