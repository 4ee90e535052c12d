"The learner: expert biases, auxiliary losses, padding, frozen parts, stages, models of others, and fits that diverge."
import pytest, torch
from fastai.basics import Callback
from libmoe_nb.moe.config import TrainingBudget
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.analysis.tracing import moe_layers, record_routing
from libmoe_nb.training.batches import TrainBatches
from libmoe_nb.training.telemetry import RoutingTelemetry
from libmoe_nb.training.learner import moe_learner
from libmoe_nb.evaluation.heldout import evaluate_perplexity, routing_loads
from small_runs import SMALL, make, fit, assert_same

pytest_plugins = ['small_data']
pytestmark = [pytest.mark.filterwarnings('ignore::FutureWarning'), pytest.mark.usefixtures('one_thread')]

def test_a_second_fit_goes_on_with_the_data(data):
    twice = make('smoe', data)
    seen = [b[0]['input_ids'] for b in TrainBatches(data.train, 4, 18)]
    class Look(Callback):
        order, got = 90, []
        def after_batch(self):
            if self.learn.training: self.got.append(self.learn.xb[0]['input_ids'])
    fit(twice, cbs=[Look]); fit(twice, 'fit', cbs=[Look])
    assert twice.step == 18 and all(torch.equal(a, b) for a, b in zip(seen, Look.got, strict=True))

# values by hand

def test_expert_bias_update_by_hand(data):
    "Three steps of two parts: bias += rate * sign(mean load - load), loads as the model before each step would choose"
    rate, model = .01, from_scratch('smoe_sigmoid', 'tiny', seed=0, expert_bias=True, **SMALL)
    loads = []
    class Look(Callback):
        order = -50
        def before_batch(self):
            if not self.learn.training: return
            with torch.no_grad(), record_routing(self.learn.model) as records:
                self.learn.model(self.learn.xb[0]['input_ids'], use_cache=False)
            loads.append({n: torch.bincount(r.top_k_index.flatten(), minlength=8).float()
                          for n, (r,) in records.items()})
    fit(make(None, data, model=model, dropout=False, steps=3, grad_accum=2, cbs=[Look()], expert_bias_rate=rate),
        epochs=1)
    for n, layer in moe_layers(model).items():
        expected = sum(rate * torch.sign(step[n].mean() - step[n]) for step in loads)
        assert torch.allclose(layer.router.expert_bias, expected, atol=1e-8) and expected.abs().max() > 0
        assert loads[0][n].sum() == 4 * 32 * 4

def test_expert_bias_counts_each_token_once_under_activation_checkpointing(data):
    def biases(on):
        model = from_scratch('sharede_v3', 'tiny', seed=0, expert_bias=True, **SMALL)
        if on: model.gradient_checkpointing_enable(dict(use_reentrant=False))
        counted = []
        class CountForwards(Callback):
            order, uses_routing = 40, True
            def after_step(self): counted.append([len(rs) for rs in self.learn.routings.values()])
        fit(make(None, data, model=model, cbs=[CountForwards()]), epochs=1)
        assert counted == [[1, 1]] * 3
        return model.state_dict()
    assert_same(biases(False), biases(True))

def test_aux_loss_reaches_the_gradient_and_not_the_loss(data):
    def one(coef):
        learn = make('smoe', data, dropout=False, steps=1,
                     model=from_scratch('smoe', 'tiny', seed=0, router_aux_loss_coef=coef, **SMALL))
        class GradsOfStep(Callback):
            order = -50
            def before_step(self): self.grads = {n: p.grad.clone() for n, p in self.learn.model.named_parameters()}
        learn.add_cb(GradsOfStep()); fit(learn, epochs=1)
        return learn
    without, with_ = one(0.), one(10.)
    assert (without.recorder.losses == with_.recorder.losses and with_.history().aux_loss[0] > 9
            and without.history().aux_loss[0] == 0)
    different = {n for n, g in with_.grads_of_step.grads.items() if not torch.equal(g, without.grads_of_step.grads[n])}
    assert any('router' in n for n in different) and 'base.lm_head.weight' not in different

def test_padding_counts_in_no_loss(data):
    "Two parts, one of which is mostly padding, are one batch: gradient and loss are means over its tokens"
    class Padded:
        sequence_length = 32
        def batches(self, B, seed=0, start=0):
            for b in data.train.batches(B, seed, start):
                b['labels'][0, 3:], b['domain'][0, 3:], b['input_ids'][0, 3:] = -100, -1, 0
                yield b
    def grads(k):
        learn = make('dense', data, dropout=False, steps=1, grad_accum=k, grad_clip=0)
        learn.dls.train.dataset = Padded()
        class GradsOfStep(Callback):
            def before_step(self): self.grads = [p.grad.clone() for p in self.learn.model.parameters()]
        learn.add_cb(GradsOfStep()); fit(learn, epochs=1)
        return learn.grads_of_step.grads, learn.recorder.losses
    (a, la), (b, lb) = grads(1), grads(4)
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b)) and abs(la[0] - lb[0]) < 1e-5

# models of others

def test_any_causal_language_model_trains(data):
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=1, n_head=2,
                                       bos_token_id=None, eos_token_id=None))
    before = evaluate_perplexity(model, data, steps=2)['loss']
    learn = fit(moe_learner(model, data, preset='tiny', batch_size=8, steps=10, valid_steps=2), 'fit_one_cycle', 1,
                lr_max=1e-2)
    assert evaluate_perplexity(model, data, steps=2)['loss'] < before - .5 and learn.history().aux_loss[0] == 0

def test_mixtures_of_transformers_train_and_are_watched(data):
    from transformers import MixtralConfig, MixtralForCausalLM
    model = MixtralForCausalLM(MixtralConfig(vocab_size=300, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=.5,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=None))
    telemetry = RoutingTelemetry(2)
    learn = fit(moe_learner(model, data, preset='tiny', batch_size=4, steps=4, valid_steps=2, cbs=telemetry),
                epochs=1)
    assert learn.aux_loss.weight == .5 and learn.history().aux_loss[0] > .9
    table = telemetry.table()
    assert len(table) == 2 * 3 and (table.load_max_mean >= 1).all() and (abs(table.weight_sum - 1) < 1e-5).all()
    assert routing_loads(model, data, steps=2).groupby('layer').share.sum().round(6).tolist() == [1., 1.]

# the search for a rate

def test_the_search_for_a_rate_may_diverge(data):
    import warnings
    learn = make('smoe', data)
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.filterwarnings('error', message='the loss is')
        learn.lr_find(num_it=12, end_lr=1e30, stop_div=False, show_plot=False)
    assert learn.diverged is None and fit(learn, epochs=1).step == 3

# stages and modes

def test_a_stage_needs_only_a_budget(data):
    budget = TrainingBudget(sequence_length=32, batch_size=4, steps=3, learning_rate=2e-3, warmup_steps=1,
                            weight_decay=.2, betas=(.8, .9), grad_clip=.5)
    model = from_scratch('smoe', 'tiny', seed=0, **SMALL)
    learn = fit(moe_learner(model, data, preset=budget, valid_steps=2), epochs=2)
    told = learn.settings
    assert learn.step == 6 and learn.dls.train.batch_size == 4 and max(learn.recorder.lrs) == pytest.approx(2e-3)
    assert (told['weight_decay'], told['betas[0]'], told['betas[1]'], told['grad_clip']) == (.2, .8, .9, .5)
    assert moe_learner(model, data, preset=budget, lr=1e-4, steps=7).lr == 1e-4
    with pytest.raises(ValueError, match='sequence_length of the TrainingBudget must be that of the data, 32, got 64'):
        moe_learner(model, data, preset=TrainingBudget(sequence_length=64, batch_size=4, steps=3, learning_rate=1e-3))

class SeeModes(Callback):
    "Notes the mode of each module at each step"
    order, run_valid = 90, False
    def __init__(self): self.seen = []
    def before_batch(self): self.seen.append(modes(self.learn.model))

def modes(model): return {n: m.training for n, m in model.named_modules()}

@pytest.mark.parametrize('more', [{}, dict(grad_accum=2)], ids=str)
def test_a_frozen_part_stays_frozen(more, data):
    see, model = SeeModes(), from_scratch('smoe', 'tiny', seed=0, **SMALL)
    frozen = model.base.model.layers[0].eval()
    asked = modes(model)
    learn = make(None, data, model=model, dropout=False, cbs=[see], **more)
    with learn.no_bar(): learn.validate()
    assert modes(model) == asked
    evaluate_perplexity(model, data, steps=1)
    assert modes(model) == asked
    for _ in range(2): fit(learn, epochs=2)
    assert len(see.seen) == 12 and all(m == asked for m in see.seen) and not any(modes(model).values())
    model.train()                                                   # you may also free it again
    fit(learn, epochs=1)
    assert frozen not in learn.keep_modes.frozen and all(see.seen[-1].values())

def test_a_model_in_evaluation_mode_is_trained(data):
    "As `from_pretrained` returns it"
    see, model = SeeModes(), from_scratch('smoe', 'tiny', seed=0, **SMALL).eval()
    fit(make(None, data, model=model, dropout=False, cbs=[see]), epochs=1)
    assert all(all(m.values()) for m in see.seen)

def test_an_event_is_told_to_those_who_hear_it(data):
    told = []
    class Heard(Callback):
        def after_pred(self): told.append('method')
    class Every(Callback):
        def __call__(self, event_name): told.append(event_name)
    class Once(Callback):
        def before_fit(self): self.run = False
        def after_pred(self): told.append('never')
    once, made = Once(), Callback(after_fit=lambda self: told.append('function'))
    learn = make('smoe', data, cbs=[Heard(), Every(), made, once])
    fit(learn, epochs=1)
    assert 'method' in told and 'after_pred' in told and told.count('function') == 1
    assert 'never' not in told and once.run
    with pytest.raises(ValueError, match='event_name'): learn('before_lunch')
