"What new versions of dependencies change: names, warnings, requirements."
import copy, dataclasses, json, logging, os, pickle, re, subprocess, sys, warnings
import pytest, torch, yaml
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from packaging.requirements import Requirement
from packaging.version import Version
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from likeness import same_logits, same_weights
from libmoe_nb.analysis.tiny_models import tiny_moe
from libmoe_nb.experiments.inspect import load_subject
from libmoe_nb.data.text import text_data
from libmoe_nb.evaluation.suites import make_suite
from libmoe_nb.models.causal import MoECausalLMOutput, from_scratch
from libmoe_nb.terminal import only_our_warnings

# one cache, two names: `past_key_values` until transformers 5.23, `cache` from 5.24 on

NAMES = 'cache', 'past_key_values'

@pytest.fixture(scope='module')
def model():
    return from_scratch('smoe', 'tiny', seed=0, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
                        num_experts=4, top_k=2, moe_intermediate_size=16, vocab_size=96).eval()

@pytest.fixture
def quiet(monkeypatch):
    "Warnings are errors, also those that transformers logs once in a process"
    def fail(self, message, *args, **kwargs): raise AssertionError(f'transformers warns: {message}')
    monkeypatch.setattr(logging.Logger, 'warning_once', fail)
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning): warnings.simplefilter('error', kind)
        yield

def ids(S=9): return torch.randint(1, 96, (2, S), generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_both_names_go_in_and_come_out(name, model, quiet):
    x, out = ids(), model(ids()[:, :5], use_cache=True)
    kept = getattr(out, name)
    assert kept is not None and all(kept is c
                                    for c in (out.cache, out.past_key_values, out['cache'], out['past_key_values'],
                                              out.get('cache'), out.get('past_key_values')))
    assert all(n in out for n in NAMES) and kept in out.to_tuple() and len(set(NAMES) & set(out.keys())) == 1
    torch.testing.assert_close(model(x[:, 5:], **{name: copy.deepcopy(kept)}).logits, model(x).logits[:, 5:],
                               atol=1e-5, rtol=1e-4)
    assert model(x, return_dict=False, use_cache=True)[1].get_seq_length() == 9

@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_generation_takes_both_names(name, model, quiet):
    x, plain = ids(), model.generate(ids(), max_new_tokens=4, do_sample=False)
    started = model(x[:, :-1], **{name: DynamicCache(config=model.config)}, use_cache=True)
    assert torch.equal(model.generate(x, max_new_tokens=4, do_sample=False, **{name: getattr(started, name)}), plain)
    out = model.generate(x, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)

@torch.no_grad()
def test_no_cache_and_two_caches(model, quiet):
    out = model(ids(), use_cache=False)
    assert out.cache is None and out.past_key_values is None and not any(n in out or out.get(n) for n in NAMES)
    assert model(ids(), cache=None, past_key_values=None).logits.shape == (2, 9, 96)
    a, b = (model(ids()[:, :5], use_cache=True).cache for _ in range(2))
    with pytest.raises(ValueError, match='cache and past_key_values name the same thing: give one of them'):
        model(ids()[:, 5:], cache=a, past_key_values=b)
    with pytest.raises(ValueError, match='give one of them'): model.generate(ids(), cache=a, past_key_values=b)
    model(ids()[:, 5:], cache=a, past_key_values=a)         # the same one twice is one

def test_an_output_can_be_written_copied_and_pickled(model, quiet):
    out = MoECausalLMOutput(logits=torch.ones(1))
    for i, n in enumerate(NAMES):
        setattr(out, n, i)
        assert out.cache == out.past_key_values == i
    assert pickle.loads(pickle.dumps(out)).past_key_values == copy.copy(out).cache == 1
    assert {f.name for f in dataclasses.fields(MoECausalLMOutput)} == {
        f.name for f in dataclasses.fields(MoeCausalLMOutputWithPast)}

@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_a_base_model_gets_the_name_that_it_takes(name, model, quiet):
    m, base = copy.deepcopy(model), {}
    def old(self, input_ids=None, past_key_values=None, **kwargs):
        return base.update(old=past_key_values) or CausalLMOutputWithPast(logits=torch.ones(2, 4, 96))
    def new(self, input_ids=None, cache=None, **kwargs):
        return base.update(new=cache) or CausalLMOutputWithPast(logits=torch.ones(2, 4, 96))
    def none(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None,
             use_cache=None, logits_to_keep=0, return_dict=True):
        return base.update(none=1) or CausalLMOutputWithPast(logits=torch.ones(2, 4, 96))
    for f in (old, new, none):
        m.base.forward = f.__get__(m.base)
        m(ids(4), **({} if f is none else {name: 'a cache'}))
    assert base == dict(old='a cache', new='a cache', none=1)

@pytest.mark.long
@torch.no_grad()
def test_compiled(quiet):
    m = from_scratch('dense', 'tiny', seed=0, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
                     num_experts=4, top_k=2, moe_intermediate_size=16, vocab_size=96).eval()
    x, c = ids(), torch.compile(m, backend='eager')
    first = c(x[:, :5], use_cache=True)
    for n in NAMES:
        torch.testing.assert_close(c(x[:, 5:], **{n: copy.deepcopy(first.cache)}).logits, m(x).logits[:, 5:],
                                   atol=1e-5, rtol=1e-4)

# tensors that stay in float32

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_base_keeps_no_tensor_of_our_layers_in_float32(dtype, tmp_path):
    base = AutoConfig.for_model('deepseek_v3', vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8,
                                kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
                                first_k_dense_replace=2)
    m = from_scratch('sharede_v3', 'tiny', base=base, seed=0, num_experts=4, top_k=2, shared_gate=True,
                     expert_bias=True, moe_intermediate_size=16).eval().to(dtype)
    m.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    kinds = lambda m: {n: t.dtype for n, t in m.state_dict().items()}
    assert kinds(back) == kinds(m) and {n.rpartition('.')[2] for n, t in kinds(m).items()
                                        if t != dtype} == {'expert_bias'}
    assert same_weights(back, m) and same_logits(back(ids()).logits, m(ids()).logits)
    smoe = from_scratch('smoe', 'tiny', base=base, seed=0, num_experts=4, top_k=2, moe_intermediate_size=16)
    assert not smoe._keep_in_fp32_modules_strict          # nothing of that name there

# what a user sees of dependencies: nothing

# the bars are lm-eval's, asked for by evaluate
OURS = re.compile(r'(.*\.\.\.|\[\d+\/\d+\] .*|(libmoe|warning|intervention): .*|Running \w+ requests: .*|)')
SMALL = ('--data python --max-bytes 250000 --preset tiny --steps 2 --batch-size 4 --sequence-length 64 --vocab-size '
         '512 --threads 1'.split())

def commands(box):
    "Each command on something small, in an order in which one can use what another left"
    short = ['--data', 'python', '--threads', '1', '--max-bytes', '250000', '--sequence-length', '32']
    yield 'compare', '--recipes', 'dense,smoe', *SMALL, '--evaluate', '--examples', '4', '--out', box/'runs'
    yield 'train', 'sharede_v3', *SMALL, '--out', box/'run'
    yield 'upcycle', box/'llama', *short, '--steps', '2', '--valid-tokens', '1024', '--out', box/'up'
    for m in 'run', 'lara_mini':
        if m == 'run' or (box/m).exists():
            yield 'analyze', box/m, *short, '--tokens', '400', '--out', box/f'analysis-{m}'
    yield ('evaluate', box/'run', '--suite', box/'suite.jsonl', '--limit', '3', '--intervene', 'drop_top1', '--threads',
           '1', '--out', box/'scores')
    yield 'list',
    yield 'report', box/'runs'

# all in one process: what a library says once in a process is said where it is first used, and heard there
RUN_ALL = """
import json, sys
from libmoe_nb.cli import main
for args in json.loads(sys.argv[1]):
    print('$', *args, file=sys.stderr, flush=True)
    sys.argv[1:] = args
    try: main()
    except SystemExit as e: print('exit', e.code or 0, file=sys.stderr, flush=True)
"""

@pytest.mark.long
@pytest.mark.timeout(1800)
def test_no_message_of_a_dependency_reaches_a_user(tmp_path, monkeypatch):
    monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))
    data = text_data('python', vocab_size=512, sequence_length=64, max_bytes=250_000)
    make_suite(data, num_examples=4).save(tmp_path/'suite.jsonl')
    llama = AutoConfig.for_model('llama', vocab_size=512, hidden_size=32, intermediate_size=48, num_attention_heads=2,
                                 num_hidden_layers=2, bos_token_id=0, eos_token_id=0)
    models = dict(llama=AutoModelForCausalLM.from_config(llama))
    models |= {f: tiny_moe(f, vocab_size=512) for f in ('lara_mini',) if f in CONFIG_MAPPING}
    for f, m in models.items(): m.save_pretrained(tmp_path/f); data.tokenizer.save_pretrained(tmp_path/f)
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONWARNINGS', 'TRANSFORMERS_VERBOSITY', 'LIBMOE_DEBUG')}
    asked = [[str(a) for a in args] for args in commands(tmp_path)]
    done = subprocess.run([sys.executable, '-W', 'default', '-c', RUN_ALL, json.dumps(asked)], capture_output=True,
                          text=True, env=env)
    said = done.stderr.split('$ ')
    assert done.returncode == 0 and said[0] == '' and len(said) == len(asked) + 1, done.stderr
    for args, heard in zip(asked, said[1:]):
        first, *lines = heard.splitlines()
        assert first == ' '.join(args) and lines[-1] == 'exit 0', heard
        assert not [line for line in lines[:-1] if not OURS.fullmatch(line)], heard

def test_our_own_warnings_do_reach_a_user(capsys):
    def run(where):
        "Code of a module `where` that warns, for itself and for its caller, and logs"
        exec("import logging, warnings\n"
             "for level in 1, 2: warnings.warn(f'{__name__} {level}', stacklevel=level)\n"
             "warnings.warn('will be renamed', FutureWarning)\n"
             "logging.getLogger(__name__).warning('logged')\n", dict(__name__=where))
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter('always')
        with only_our_warnings(): run('libmoe_nb.training.learner'); run('pandas.io')
        assert capsys.readouterr().err.splitlines() == ['warning: libmoe_nb.training.learner 1',
                                                        'warning: libmoe_nb.training.learner 2'] and not others
        warnings.warn('after it, all is as before')
    assert len(others) == 1 and logging.getLogger('pandas.io').isEnabledFor(logging.WARNING)

def test_a_checkpoint_that_lacks_weights_is_not_filled_with_random_ones(tmp_path):
    m = tiny_moe('mixtral', vocab_size=96)
    m.save_pretrained(tmp_path)
    w = load_file(tmp_path/'model.safetensors')
    lost = next(n for n in w if n.endswith('q_proj.weight'))
    save_file({n: t for n, t in w.items() if n != lost}, tmp_path/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError,
                       match=f'lacks 1 weights that a MixtralForCausalLM has, and would be random there: {lost}'):
        load_subject(tmp_path, tokenizer=object())

# requirements

ROOT = Path(__file__).parent.parent
CONFIG = ConfigParser(delimiters=['='])
CONFIG.read(ROOT/'settings.ini', encoding='utf-8')
REQUIREMENTS = sorted({line.strip() for k, v in CONFIG['DEFAULT'].items() if k.endswith('requirements')
                       for line in v.splitlines() if line.strip()})

@pytest.mark.parametrize('line', REQUIREMENTS)
def test_a_requirement_has_bounds(line):
    r = Requirement(line)
    assert {s.operator for s in r.specifier} == {'>=', '<'}, 'a lower bound that was tried, and an upper one'
    low, high = (Version(next(s.version for s in r.specifier if s.operator == o)) for o in ('>=', '<'))
    assert low in r.specifier and low < high
    try: here = Version(version(r.name))
    except PackageNotFoundError: return
    assert here in r.specifier, f'{here} is installed'
    assert f'{here.major + 1}.0' not in r.specifier, 'the next major version may break anything'

def test_the_weekly_workflow_takes_the_newest_versions():
    res = subprocess.run([sys.executable, ROOT/'tools'/'newest.py'], capture_output=True, text=True,
                         check=True).stdout.splitlines()
    free = {r.name: r for r in map(Requirement, res)}
    bound = {r.name for k in ('', 'dev_', 'demo_')
             for r in map(Requirement, CONFIG['DEFAULT'][f'{k}requirements'].strip().splitlines())}
    assert set(free) == bound and all({s.operator for s in r.specifier} == {'>='} for r in free.values())
    assert str(free['smalldocs'].marker) == 'python_version >= "3.11"'
    text = (ROOT/'.github'/'workflows'/'newest.yml').read_text(encoding='utf-8')
    job, = yaml.safe_load(text)['jobs'].values()
    run = '\n'.join(s.get('run', '') for s in job['steps'])
    assert 'schedule' in text and all(w in run for w in ('tools/newest.py', '--upgrade', 'pytest', 'nbdev-test',
                                                         'gh issue create', 'moe_classes'))
