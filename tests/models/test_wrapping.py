"Upcycled models of any class: a masked language model, a translator, vision models, images with text."
import copy, json, pickle
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification,
                          AutoModelForImageTextToText,
                          AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification,
                          BertForMaskedLM,
                          CLIPVisionModel, LlavaForConditionalGeneration, T5ForConditionalGeneration, Trainer,
                          TrainingArguments, ViTForImageClassification)
from hub_made import hub_in_place
from processes import run_forked
from test_upcycling import IDS, SMALL, T5, WHOLE, error, rough, tiny_llava
from likeness import same_logits, same_weights
from libmoe_nb.moe.config import MoESpec
from libmoe_nb.moe.layers import aux_loss
from libmoe_nb.models.counting import count_parameters
from libmoe_nb.models.causal import MoEForCausalLM
from libmoe_nb.models.swapping import own_layers
from libmoe_nb.models.upcycling import upcycle
from libmoe_nb.models.wrapping import UpcycledMixin, load_upcycled, upcycled_class
from libmoe_nb.analysis.tracing import record_routing

ENCODER = {k: v for k, v in SMALL.items() if k != 'num_key_value_heads'}
IMAGE = dict(image_size=16, patch_size=8)

def built(auto, kind, **kw): return rough(auto.from_config(AutoConfig.for_model(kind, **kw)))
def pixels(n=2): return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))

class Case:
    "A dense model, where its layers are, what it takes, and which Auto class loads it"
    def __init__(self, name):
        self.where, self.auto = None, AutoModel
        if name == 'bert':
            self.auto, self.inputs = AutoModelForMaskedLM, dict(input_ids=IDS, labels=IDS)
            self.dense, self.cls = built(self.auto, 'bert', **ENCODER), BertForMaskedLM
        elif name == 't5':
            self.auto, self.inputs, self.where = (AutoModelForSeq2SeqLM, dict(input_ids=IDS, labels=IDS),
                                                  ['encoder', 'decoder'])
            self.dense, self.cls = built(self.auto, 't5', **T5), T5ForConditionalGeneration
        elif name == 'vit':
            self.auto, self.inputs = (AutoModelForImageClassification,
                                      dict(pixel_values=pixels(), labels=torch.tensor([0, 1])))
            self.dense, self.cls = built(self.auto, 'vit', **ENCODER, **IMAGE), ViTForImageClassification
        elif name == 'llava':
            self.auto, self.where = AutoModelForImageTextToText, WHOLE
            self.dense, inputs = tiny_llava(width=32)
            self.inputs, self.cls = (dict(inputs, labels=inputs['input_ids'].where(inputs['input_ids'] < 96, -100)),
                                     LlavaForConditionalGeneration)
        else:
            self.inputs = dict(pixel_values=pixels())
            self.dense, self.cls = built(AutoModel, 'clip_vision_model', **ENCODER, **IMAGE), CLIPVisionModel
    def upcycled(self, recipe='smoe', *args, **kw):
        return upcycle(self.dense, recipe, *(args or (4, 2)), where=self.where, seed=0, router_init_std=.5, **kw)

NAMES = ['bert', 't5', 'vit', 'llava', 'clip']

@pytest.fixture(params=NAMES)
def case(request): return Case(request.param)

def outputs(model, inputs):
    with torch.no_grad(): return model.eval()(**inputs)[0 if 'labels' not in inputs else 1]

def test_it_is_of_its_class_and_computes_what_it_did(case):
    moe = case.upcycled()
    assert (isinstance(moe, case.cls) and isinstance(moe, UpcycledMixin)
            and type(moe).__name__ == f'MoE{case.cls.__name__}')
    assert isinstance(moe.config, type(case.dense.config)) and type(case.dense) is case.cls
    assert moe.config.model_type == f'libmoe_{case.dense.config.model_type}' and not own_layers(case.dense)
    torch.testing.assert_close(outputs(moe, case.inputs), outputs(case.dense, case.inputs), atol=1e-3, rtol=1e-4)

def test_every_door_loads_it(case, tmp_path):
    moe = case.upcycled('xmoe')
    moe.save_pretrained(tmp_path, max_shard_size='20KB')
    assert json.loads((tmp_path/'config.json').read_text())['architectures'] == [type(moe).__name__]
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    for back in case.auto.from_pretrained(tmp_path), load_upcycled(tmp_path), type(moe).from_pretrained(tmp_path):
        assert type(back) is type(moe) and same_weights(back, moe)
        assert same_logits(outputs(back, case.inputs), outputs(moe, case.inputs))
    assert AutoConfig.from_pretrained(tmp_path).specs == moe.config.specs
    again = load_upcycled(tmp_path)
    again.save_pretrained(tmp_path/'again')
    assert same_weights(load_upcycled(tmp_path/'again'), moe)

FRESH = '''
import sys, torch, transformers, libmoe_nb.models.upcycling
want = torch.load(sys.argv[1] + '/want.pt')
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1]).eval()
with torch.no_grad(): out = model(**want['inputs'])[want['at']]
print(type(model).__name__, torch.equal(out, want['out']))
'''
@pytest.mark.parametrize('name', ['bert', 'llava'])
def test_a_process_that_never_saw_it(name, tmp_path):
    case = Case(name)
    moe = case.upcycled()
    moe.save_pretrained(tmp_path)
    torch.save(dict(inputs=case.inputs, out=outputs(moe, case.inputs), at=1), tmp_path/'want.pt')
    p = run_forked(FRESH, tmp_path, case.auto.__name__)
    assert p.stdout.split() == [type(moe).__name__, 'True'], p.stderr[-1500:]

def test_copies_and_pickles(case):
    moe = case.upcycled()
    for other in copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)):
        assert type(other) is type(moe) and other.config.specs == moe.config.specs and same_weights(other, moe)
        assert same_logits(outputs(other, case.inputs), outputs(moe, case.inputs))
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in moe.parameters()}
    config = pickle.loads(pickle.dumps(moe.config))
    assert type(config) is type(moe.config) and config.to_dict() == moe.config.to_dict()

def test_auxiliary_loss_in_training(case):
    moe = case.upcycled().train()
    with record_routing(moe) as records: out = moe(**case.inputs)
    layers = own_layers(moe)
    want, _ = aux_loss([(l, r) for n, l in layers.items() for r in records[n]])
    if case.cls is LlavaForConditionalGeneration: assert len(layers) >= 4
    torch.testing.assert_close(out.aux_loss, want)
    torch.testing.assert_close(out['aux_loss'], want)
    loss = out.aux_loss
    if 'labels' in case.inputs:
        plain = case.cls.forward(moe.eval(), **case.inputs)
        torch.testing.assert_close(moe(**case.inputs).loss, plain.loss)
        assert not hasattr(moe(**case.inputs), 'aux_loss')     # in evaluation the loss is the model's own
        asked = moe(**case.inputs, output_router_logits=True)
        torch.testing.assert_close(asked.loss, plain.loss + asked.aux_loss)
        assert len(asked.router_logits) == len(layers)
        assert isinstance(asked, type(plain))
        loss = moe.train()(**case.inputs).loss
        torch.testing.assert_close(moe.eval()(**case.inputs, output_router_logits=True, return_dict=False)[0],
                                   asked.loss)
    loss.backward()
    assert all(next(l.router.parameters()).grad.abs().sum() > 0 for l in layers.values())

def test_padding_counts_in_no_auxiliary_loss():
    case = Case('bert')
    moe, mask = case.upcycled(), torch.ones_like(IDS)
    mask[:, 5:] = 0
    padded = moe(IDS, attention_mask=mask, output_router_logits=True).aux_loss
    torch.testing.assert_close(padded, moe(IDS[:, :5], output_router_logits=True).aux_loss, atol=1e-5, rtol=1e-4)
    assert (padded - moe(IDS, output_router_logits=True).aux_loss).abs() > 1e-5

def test_masks_of_two_sides():
    "The encoder's mask says nothing of the decoder, though both have as many tokens"
    moe = Case('t5').upcycled()
    mask = torch.ones_like(IDS); mask[:, 4:] = 0
    out = dict(input_ids=IDS, decoder_input_ids=IDS, output_router_logits=True)
    with record_routing(moe) as records:
        got = moe(**out, attention_mask=mask, decoder_attention_mask=mask.flip(1)).aux_loss
    layers = own_layers(moe)
    each = [aux_loss([(l, r)], (mask if n.startswith('encoder') else mask.flip(1)).bool())[0]
            for n, l in layers.items() for r in records[n]]
    torch.testing.assert_close(got, sum(each) / len(each))

@pytest.mark.parametrize('name', ['bert', 'llava'])
def test_parts_of_a_step_add_up(name):
    "Micro-batches whose losses are divided by the labels of the whole step, where a class divides by them"
    case = Case(name)
    moe = case.upcycled()
    ids = torch.cat([case.inputs['input_ids']] * (2 if name == 'llava' else 1))
    rows = [dict(input_ids=ids[i:i+1], labels=case.inputs['labels'][:1] if name == 'llava' else IDS[i:i+1],
                 **({'pixel_values': case.inputs['pixel_values']} if name == 'llava' else {})) for i in range(2)]
    n = sum((r['labels'][:, int(name == 'llava'):] != -100).sum() for r in rows)
    parts = [moe(**r, num_items_in_batch=n, output_router_logits=True).aux_loss for r in rows]
    alone = [moe(**r, output_router_logits=True).aux_loss for r in rows]
    torch.testing.assert_close(sum(parts), sum(alone) / 2)
    assert moe.accepts_loss_kwargs is (name == 'llava')

def test_trainer(case, tmp_path):
    if 'labels' not in case.inputs: pytest.skip('a class without a loss')
    moe = case.upcycled()
    rows = [{k: v[i] for k, v in case.inputs.items()} for i in range(len(next(iter(case.inputs.values()))))] * 4
    before = {n: p.clone() for n, p in moe.named_parameters()}
    args = TrainingArguments(tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                             save_strategy='no', gradient_accumulation_steps=2, learning_rate=1e-3, disable_tqdm=True)
    trainer = Trainer(moe, args, train_dataset=rows)
    trainer.train()
    assert all(not torch.equal(l.router.weight, before[f'{n}.router.weight']) for n, l in own_layers(moe).items())
    trainer.save_model(tmp_path/'model')
    assert same_weights(load_upcycled(tmp_path/'model'), moe)

@pytest.mark.parametrize('recipe', ['smoe', 'moe_plus_plus'])
def test_checkpointing_changes_no_gradient(recipe):
    case = Case('bert')
    moe, grads = case.upcycled(recipe, 4, 2).train(), []
    for m in moe.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.
    for checkpointed in False, True:
        if checkpointed: moe.activation_checkpointing_enable(dict(use_reentrant=False))
        moe.zero_grad()
        moe(**case.inputs).loss.backward()
        grads.append({n: p.grad.clone() for n, p in moe.named_parameters() if p.grad is not None})
    for n in grads[0]: torch.testing.assert_close(grads[1][n], grads[0][n])
    with pytest.raises(ValueError, match='use_reentrant must be False'):
        moe.activation_checkpointing_enable(dict(use_reentrant=True))

def test_dtype_and_device_map(case, tmp_path):
    moe = case.upcycled('sharede_v3', 6, 3, expert_bias=True)
    moe.save_pretrained(tmp_path)
    back = case.auto.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map='cpu')
    for l in own_layers(back).values():
        assert l.experts.down_proj.dtype == torch.bfloat16 and l.router.expert_bias.dtype == torch.float32

def test_pushed_as_it_is_saved(monkeypatch, tmp_path):
    hub, moe = hub_in_place(monkeypatch), Case('bert').upcycled()
    for push in (lambda: moe.save_pretrained(tmp_path/'a', push_to_hub=True, repo_id='bert', private=True),
                 lambda: moe.push_to_hub('bert', private=True)):
        hub.calls.clear()
        push()
        assert [(c[0], c[1]) for c in hub.calls] == [('create', 'bert'), ('upload', 'me/bert')]
        assert hub.calls[0][2]['private'] and {'config.json', 'model.libmoe.safetensors'} <= {*hub.files}
        assert json.loads(hub.files['config.json'])['model_type'] == 'libmoe_bert'
        assert b"load_upcycled('bert')" in hub.files['README.md']

def test_a_card_is_written_by_the_main_process_and_over_no_card_of_yours(tmp_path):
    moe = Case('bert').upcycled()
    moe.save_pretrained(tmp_path/'a', is_main_process=False)
    assert not (tmp_path/'a'/'README.md').exists()
    moe.save_pretrained(tmp_path/'b')
    assert '| `smoe` |' in (tmp_path/'b'/'README.md').read_text()
    (tmp_path/'b'/'README.md').write_text('mine')
    moe.save_pretrained(tmp_path/'b')
    assert (tmp_path/'b'/'README.md').read_text() == 'mine'

def test_a_part_of_a_checkpoint(tmp_path):
    "The body without its head, and another head: names differ by the body's prefix"
    case = Case('bert')
    moe = case.upcycled()
    moe.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path).eval()
    assert list(own_layers(body)) == [n.removeprefix('bert.') for n in own_layers(moe)]
    with torch.no_grad():
        assert torch.equal(body(IDS).last_hidden_state, moe.eval().bert(IDS).last_hidden_state)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert list(own_layers(other)) == list(own_layers(moe))
    body.save_pretrained(tmp_path/'body')
    with torch.no_grad(): assert torch.equal(load_upcycled(tmp_path/'body').eval()(IDS)[0], body(IDS)[0])

def test_two_recipes_in_one_model(tmp_path):
    "Called twice, with a layer of another recipe each time: saved and loaded"
    case = Case('llava')
    first = upcycle(case.dense, 'smoe', 4, 2, where='vision_tower', seed=0)
    both = upcycle(first, 'sharede_v2', 6, 3, where='language_model', seed=1)
    assert type(both) is type(first) and {s.recipe for s in both.config.specs.values()} == {'smoe', 'sharede_v2'}
    assert error(case.dense, both, **{k: v for k, v in case.inputs.items() if k != 'labels'}) < 2e-5
    both.save_pretrained(tmp_path)
    back = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert same_weights(back, both) and same_logits(outputs(back, case.inputs), outputs(both, case.inputs))
    assert count_parameters(both)['total'] == both.num_parameters()
    with pytest.raises(ValueError, match='a mixture of experts already: smoe'): upcycle(both, where='vision_tower')

def test_linked_routers_grow_in_either_direction(tmp_path):
    "MoE++ in the second layer, then in the first: what was first has a predecessor now, and computes what it did"
    dense = Case('bert').dense
    second = upcycle(dense, 'moe_plus_plus', 4, 2, layers=[1], exact=True, seed=0)
    both = upcycle(second, 'moe_plus_plus', 4, 2, layers=[0], exact=True, seed=1)
    first, last = own_layers(both).values()
    assert (last._previous[0] is first and last.router.gating_residual is not None
            and error(dense, both, input_ids=IDS) < 2e-5)
    both.save_pretrained(tmp_path)
    assert same_weights(load_upcycled(tmp_path), both)

def test_missing_weights_of_our_layers_are_refused(tmp_path):
    Case('bert').upcycled().save_pretrained(tmp_path)
    f = tmp_path/'model.libmoe.safetensors'
    w = load_file(f)
    name = next(n for n in w if n.endswith('experts.down_proj'))
    save_file({n: t for n, t in w.items() if n != name}, f, metadata=dict(format='pt'))
    for load in AutoModelForMaskedLM.from_pretrained, load_upcycled:
        with pytest.raises(ValueError, match=f'does not fit its configuration: missing_keys: {name}'): load(tmp_path)

def test_from_scratch_with_a_map():
    "A class built from a configuration: layers are drawn by their own rules"
    moe = Case('bert').upcycled()
    config = copy.deepcopy(moe.config)
    config.libmoe = {n: MoESpec('smoe', 32, num_experts=4, top_k=2, moe_intermediate_size=16,
                                expert_init_std=(.7, .05)).to_dict()
                     for n in config.libmoe}
    torch.manual_seed(0)
    made = upcycled_class(BertForMaskedLM)(config)
    for l in own_layers(made).values():
        assert .6 < l.experts.up_proj.std() < .8 and .04 < l.experts.down_proj.std() < .06
    made.init_weights()
    assert all(l.experts.up_proj.std() > .6 for l in own_layers(made).values())
    config.libmoe = {'bert.encoder.layer.7': next(iter(config.libmoe.values()))}
    with pytest.raises(ValueError, match='libmoe must be names of modules of MoEBertForMaskedLM'):
        upcycled_class(BertForMaskedLM)(config)

def test_generation():
    case = Case('t5')
    assert torch.equal(case.upcycled().generate(IDS, max_new_tokens=4, do_sample=False),
                       case.dense.generate(IDS, max_new_tokens=4, do_sample=False))

def test_causal_language_models_are_what_they_were():
    dense = built(AutoModelForCausalLM, 'llama', **SMALL)
    assert type(upcycle(dense, 'smoe', 4, 2)) is MoEForCausalLM

SAVER = '''import sys
from transformers import AutoConfig
import libmoe_nb.models.upcycling
if sys.argv[2] == 'looked up': AutoConfig.for_model('libmoe_llava')
from test_wrapping import Case
Case('llava').upcycled().save_pretrained(sys.argv[1])
'''

@pytest.mark.long
def test_names_in_a_file_do_not_depend_on_who_asked_before(tmp_path):
    "transformers renames some weights of LLaVA by its model type, once it knows the type"
    names, path = [], [str(p) for p in (Path(__file__).parent, Path(__file__).parents[1])]
    code = f'import sys; sys.path[:0] = {path!r}\n{SAVER}'
    for how in ('looked up', 'not'):
        assert not (p := run_forked(code, tmp_path/how, how)).returncode, p.stderr[-1500:]
        names.append({k for p in (tmp_path/how).glob('*.safetensors') for k in load_file(p)})
        assert isinstance(load_upcycled(tmp_path/how), LlavaForConditionalGeneration)
    assert names[0] == names[1]
