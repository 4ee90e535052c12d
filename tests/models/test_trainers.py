"""Models in other people's hands: torch.compile, the Trainer, TRL, generation from embeddings, what tools read
off a configuration."""
import copy, inspect, json, pickle
import pytest, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments
from likeness import same_logits, same_weights
from libmoe_nb.moe.config import MoESpec
from libmoe_nb.models.causal import MoEForCausalLM, from_scratch
from libmoe_nb.models.configuration import MoEConfig
from libmoe_nb.analysis.tracing import moe_layers, record_routing
from libmoe_nb.models.upcycling import upcycle

transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
SMALL = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16, num_experts=6,
             top_k=3, moe_intermediate_size=16)
IDS = torch.randint(1, 96, (4, 10), generator=torch.Generator().manual_seed(0))
ROWS = [dict(input_ids=r, labels=r, attention_mask=torch.ones_like(r)) for r in IDS]

def make(recipe='smoe', **kw): return from_scratch(recipe, 'tiny', seed=0, **SMALL | kw)
def llama(**kw):
    return LlamaConfig(**dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None) | kw)
def arguments(folder, **kw):
    return TrainingArguments(str(folder), **dict(max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                                                 save_strategy='no', logging_steps=1, disable_tqdm=True) | kw)

# ---- torch.compile
def step(m, call, checkpointed):
    if checkpointed: m.gradient_checkpointing_enable()
    out = call(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS))
    out.loss.backward()
    return out, [p.grad for p in m.parameters()]

@pytest.mark.long
@pytest.mark.parametrize('recipe, checkpointed', [('smoe', False), ('moe_plus_plus', True)])
def test_compiled_models_train(recipe, checkpointed):
    torch._dynamo.reset()
    a, b = make(recipe).train(), make(recipe).train()
    c = torch.compile(b, backend='eager')
    if not checkpointed:
        # what was compiled for evaluation, where nothing is noted, is not used in training
        with torch.no_grad(): c.eval()(input_ids=IDS); c.train()
    (one, grads), (two, others) = step(a, a, checkpointed), step(b, c, checkpointed)
    assert two.aux_loss > 0
    torch.testing.assert_close((two.loss, two.aux_loss), (one.loss, one.aux_loss))
    for g, h in zip(grads, others): torch.testing.assert_close(h, g)
    with record_routing(b) as records: c(input_ids=IDS)
    assert all(len(r) == 1 for r in records.values())

@pytest.mark.long
def test_trainer_compiles(tmp_path):
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        trainer = Trainer(make(router_aux_loss_coef=1.),
                          arguments(tmp_path, torch_compile=compiled,
                                    **dict(torch_compile_backend='eager') if compiled else {}), train_dataset=ROWS)
        trainer.train()
        losses.append([l['loss'] for l in trainer.state.log_history if 'loss' in l])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-4)

# ---- predictions
def test_predictions_and_metrics(tmp_path):
    m = make()
    seen = []
    def metrics(p):
        seen.append(p)
        return dict(right=float((p.predictions.argmax(-1)[:, :-1] == p.label_ids[:, 1:]).mean()))
    trainer = Trainer(m, arguments(tmp_path), eval_dataset=ROWS, compute_metrics=metrics)
    assert 0 <= trainer.evaluate()['eval_right'] <= 1
    predictions = trainer.predict(ROWS)
    assert predictions.predictions.shape == (4, 10, 96) and 0 <= predictions.metrics['test_right'] <= 1
    torch.testing.assert_close(torch.tensor(predictions.predictions), m.eval()(IDS).logits, atol=1e-5, rtol=1e-4)
    m.config.output_router_logits = True
    assert trainer.predict(ROWS).predictions.shape == (4, 10, 96)

# ---- TRL
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    tok = Tokenizer(models.WordLevel({c: i for i, c in enumerate(['<end>', '[UNK]', *'abcdefghijklmnopqrstuvwxyz '])},
                                     unk_token='[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='<end>', pad_token='<end>')

TEXTS = ['the cat sat', 'a dog barked at the moon', 'no', 'yes it is so'] * 2

def sft(model, folder, peft_config=None, **kw):
    trl = pytest.importorskip('trl', reason='pip install trl')
    from datasets import Dataset
    data = Dataset.from_dict(dict(text=TEXTS))
    args = trl.SFTConfig(str(folder), **dict(max_steps=1, report_to=[], use_cpu=True, bf16=False, logging_steps=1,
                                             save_strategy='no', disable_tqdm=True) | kw)
    return trl.SFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer(),
                          peft_config=peft_config)

@pytest.mark.parametrize('recipe', ['smoe', 'sharede_v3', 'tcmoe', 'moe_plus_plus'])
def test_sft_trains_with_our_auxiliary_loss(recipe, tmp_path):
    "The first step's loss and gradients are those of our own forward"
    kw = dict(router_aux_loss_coef=1., num_shared_experts=int('shared' in recipe))
    m, own = make(recipe, **kw), make(recipe, **kw).train()
    trainer = sft(m, tmp_path, gradient_checkpointing=False)
    batch = next(iter(trainer.get_train_dataloader()))
    out = own(**{k: v for k, v in batch.items() if k in ('input_ids', 'attention_mask', 'labels')})
    out.loss.backward()
    assert out.aux_loss > .1
    trainer.current_gradient_accumulation_steps = 1 # what training sets
    loss = trainer.compute_loss(m.train(), dict(batch), num_items_in_batch=(batch['labels'][:, 1:] != -100).sum())
    loss.backward()
    torch.testing.assert_close(loss, out.loss, atol=1e-4, rtol=1e-4)
    for (n, p), q in zip(m.named_parameters(), own.parameters()):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-3, msg=lambda s: f'{n}: {s}')

@pytest.mark.parametrize('recipe', ['dense', 'smoe'])
def test_sft_by_default(recipe, tmp_path):
    m = make(recipe)
    trainer = sft(m, tmp_path, max_steps=2)
    trainer.train()
    logs = [l for l in trainer.state.log_history if 'loss' in l]
    assert len(logs) == 2 and all(('aux_loss' in l) == (recipe == 'smoe') for l in logs)
    assert trainer.evaluate()['eval_loss'] < 6
    m.save_pretrained(tmp_path/'saved')
    back = AutoModelForCausalLM.from_pretrained(tmp_path/'saved')
    assert same_weights(back, m) and same_logits(back(IDS % 28).logits, m.eval()(IDS % 28).logits)
    assert m.generate(IDS[:, :3] % 28, max_new_tokens=3).shape == (4, 6)

def test_sft_adds_the_auxiliary_loss_times_its_coefficient(tmp_path):
    losses = {}
    for c in (0., 1., 2.):
        trainer = sft(make(router_aux_loss_coef=1.), tmp_path, router_aux_loss_coef=c, gradient_checkpointing=False)
        batch = next(iter(trainer.get_train_dataloader()))
        losses[c] = trainer.compute_loss(trainer.model.train(), dict(batch)).item()
    assert losses[1.] - losses[0.] > .1 and losses[2.] - losses[1.] == pytest.approx(losses[1.] - losses[0.], rel=1e-3)

def test_sft_of_adapters(tmp_path):
    peft = pytest.importorskip('peft', reason='pip install peft')
    from libmoe_nb.models.lora import lora_targets
    m = make()
    trainer = sft(m, tmp_path, peft.LoraConfig(r=2, task_type='CAUSAL_LM', **lora_targets(m, 'experts')))
    trainer.train()
    assert [l['aux_loss'] for l in trainer.state.log_history if 'aux_loss' in l] == [pytest.approx(.01, rel=.2)]

# ---- what is passed on to the base
@pytest.mark.parametrize('recipe', ['dense', 'smoe', 'moe_plus_plus'])
def test_generation_from_embeddings(recipe):
    m = make(recipe).eval()
    args = dict(max_new_tokens=5, do_sample=False)
    assert torch.equal(m.generate(inputs_embeds=m.get_input_embeddings()(IDS), **args), m.generate(IDS, **args)[:, 10:])

def test_what_generation_takes_is_what_the_base_takes():
    g = from_scratch('smoe', 'tiny', seed=0,
                     base=AutoConfig.for_model('gpt2', vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_inner=48,
                                               bos_token_id=None, eos_token_id=None)).eval()
    assert g.generate(IDS, token_type_ids=torch.ones_like(IDS), max_new_tokens=2).shape == (4, 12)
    with pytest.raises(ValueError, match='token_typ_ids'): g.generate(IDS, token_typ_ids=IDS, max_new_tokens=2)
    for name in ('prepare_inputs_for_generation get_input_embeddings set_input_embeddings get_output_embeddings '
                 'resize_token_embeddings get_decoder'.split()):
        assert inspect.signature(getattr(g, name)) == inspect.signature(getattr(g.base, name)), name
    m = make()
    m.resize_token_embeddings(99)
    assert m.vocab_size == m.base.vocab_size == m.config.vocab_size == 99

# ---- configurations
def test_attention_of_the_base_is_kept():
    spec = MoESpec(hidden_size=32, num_experts=6, top_k=3, moe_intermediate_size=16)
    for m in (MoEForCausalLM(MoEConfig(llama(attn_implementation='eager'), spec)),
              MoEForCausalLM._from_config(MoEConfig(llama(), spec), attn_implementation='eager'),
              upcycle(AutoModelForCausalLM.from_config(llama(), attn_implementation='eager'), 'smoe', 4, 2)):
        assert m.base.model.layers[0].self_attn.config._attn_implementation == m.config._attn_implementation == 'eager'
        assert len(m(IDS, output_attentions=True).attentions) == 2
    assert MoEForCausalLM(MoEConfig(llama(), spec)).base.config._attn_implementation == 'sdpa'

def test_text_configuration(tmp_path):
    c = make().config
    text = c.get_text_config()
    assert isinstance(text, LlamaConfig) and (text.num_experts, text.num_experts_per_tok,
                                              text.output_router_logits) == (6, 3, False)
    text.rms_norm_eps, text.output_router_logits, text.router_aux_loss_coef = 1e-3, True, .5
    assert (c.base_config.rms_norm_eps, c.output_router_logits, c.spec.router_aux_loss_coef) == (1e-3, True, .01)
    for again in (copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert type(again) is LlamaConfig and again.to_dict() == c.base_config.to_dict()
    c.save_pretrained(tmp_path)
    saved = json.loads((tmp_path/'config.json').read_text())
    assert (not {'num_experts', 'router_aux_loss_coef', 'output_router_logits'} & set(saved['base_config'])
            and not {'hidden_size', 'vocab_size', '_aux_loss_factor'} & set(saved))
    assert ((d := c.to_dict())['hidden_size'] == 32 and MoEConfig.from_dict(d).to_diff_dict()
            == AutoConfig.from_pretrained(tmp_path).to_diff_dict() == c.to_diff_dict())
    assert not hasattr(make('dense').config.get_text_config(), 'output_router_logits')

@pytest.mark.parametrize('recipe', ['smoe', 'dense'])
@pytest.mark.parametrize('layers, left', [(None, set()), ([1], {0})])
def test_plans_name_what_is_there(recipe, layers, left):
    m = make(recipe, base=llama(), layers=layers)
    names = {n for n, _ in m.named_modules()} | {n for n, _ in m.named_parameters()}
    expand = lambda rule: {n for n in (rule.replace('*', str(i)) for i in range(2)) if n in names}
    for plan in (m.tp_plan, m.fsdp_plan, m.pp_plan): assert plan and all(expand(rule) for rule in plan)
    for part in ('up_proj', 'down_proj'):
        assert {n for rule in m.tp_plan for n in expand(rule)
                if n.endswith(f'mlp.{part}')} == {f'base.model.layers.{i}.mlp.{part}' for i in left}
    assert 'base.model.layers.*.self_attn.q_proj' in m.tp_plan

def test_only_models_with_an_expert_bias_keep_one_in_full_precision():
    assert not make()._keep_in_fp32_modules_strict
    biased = make('sharede_v3', num_shared_experts=1, expert_bias=True)
    assert (len(biased._keep_in_fp32_modules_strict) == 2
            and biased._keep_in_fp32_modules_strict < set(biased.state_dict()))

def test_padding_beside_a_cache_counts_in_no_auxiliary_loss():
    m, mask = make().eval(), torch.ones_like(IDS)
    mask[:, 7:] = 0
    first = m(IDS[:, :4], attention_mask=mask[:, :4], use_cache=True)
    past = first.past_key_values
    with record_routing(m) as records:
        out = m(IDS[:, 4:], attention_mask=mask, past_key_values=past, output_router_logits=True)
    from libmoe_nb.moe.layers import aux_loss
    layers = moe_layers(m)
    want = aux_loss([(l, records[n][0]) for n, l in layers.items()], mask[:, 4:].bool())[0]
    torch.testing.assert_close(out.aux_loss, want)

@pytest.mark.long
@pytest.mark.parametrize('recipe', ['smoe', 'moe_plus_plus'])
def test_deep_models_are_compiled_once(recipe):
    "A layer compiled anew for each layer before it would soon run as written"
    torch._dynamo.reset()
    m = from_scratch(recipe, 'tiny', num_hidden_layers=10, seed=0).train()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        want, got = (f(input_ids=IDS, labels=IDS) for f in (m, torch.compile(m, backend='eager')))
    assert got.aux_loss > 0
    torch.testing.assert_close((got.loss, got.aux_loss), (want.loss, want.aux_loss))
