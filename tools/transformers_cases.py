"Our models in transformers' own model tests; `tools/transformers_tests.py` runs them."
import unittest, warnings
from transformers import DynamicCache, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from libmoe_nb.moe.config import MoESpec
from libmoe_nb.models.causal import MoEForCausalLM
from libmoe_nb.models.configuration import MoEConfig

recipes = 'dense smoe smoe_sigmoid xmoe sharede_v2 sharede_v3 tcmoe moe_plus_plus'.split()
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES['libmoe'] = 'MoEForCausalLM'   # so that they hand over labels

# ---- the models
class Sizes:
    "What the tests call a model tester"
    batch_size, seq_length, num_hidden_layers, hidden_size, num_attention_heads, is_training = 3, 7, 2, 32, 4, True
    causal_lm_class = MoEForCausalLM
    def __init__(self, recipe): self.recipe = recipe
    def get_config(self):
        base = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                           pad_token_id=0, bos_token_id=None, eos_token_id=None)
        options = dict(expert_bias=True) if self.recipe == 'sharede_v3' else {}
        return MoEConfig(base, MoESpec(self.recipe, hidden_size=32, num_experts=6, top_k=3, moe_intermediate_size=16,
                                       num_shared_experts=2 * self.recipe.startswith('sharede'), options=options))
    def prepare_config_and_inputs_for_common(self):
        from tests.test_modeling_common import ids_tensor, random_attention_mask
        return self.get_config(), dict(input_ids=ids_tensor([3, 7], 99), attention_mask=random_attention_mask([3, 7]))

def _common():
    from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin
    class Common(ModelTesterMixin, GenerationTesterMixin):
        all_model_classes = (MoEForCausalLM,)
        def test_training_gradient_checkpointing_use_reentrant_true(self):
            "Differs by design: reentrant checkpointing leaves routers without a gradient of their auxiliary losses"
            model = MoEForCausalLM(self.model_tester.get_config())
            with self.assertRaisesRegex(ValueError, 'use_reentrant must be False'):
                model.activation_checkpointing_enable(dict(use_reentrant=True))
        def test_model_weights_reload_no_missing_tied_weights(self):
            "Differs by design: a checkpoint with missing weights is refused"
            with self.assertRaisesRegex(ValueError, 'does not fit its configuration: .* is missing'):
                super().test_model_weights_reload_no_missing_tied_weights()
        def test_bc_cache_name_forward(self):
            "Differs by design: both names of the cache are taken, and neither warns"
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = MoEForCausalLM(config).eval()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter('always')
                outs = [model(**inputs, use_cache=True,
                              **{name: DynamicCache(config=config.get_text_config(decoder=True))})
                        for name in ('cache', 'past_key_values')]
            self.assertEqual([o.cache.get_seq_length() for o in outs], [7, 7])
            self.assertEqual([str(w.message) for w in said if 'past_key_values' in str(w.message)], [])
        def test_retain_grad_hidden_states_attentions(self):
            if self.model_tester.recipe == 'dense':
                self.skipTest("By design: the first output of a dense model in training is its auxiliary loss, the "
                              "constant 0, which has no gradient")
            super().test_retain_grad_hidden_states_attentions()
    return Common

def _distributed():
    from tests import (test_expert_parallel_mixin as ep, test_fsdp_mixin as fsdp, test_tensor_parallel_mixin as tp,
                       test_training_mixin as training)
    ep.EP_DISTRIBUTED_TEST_MODEL_TYPES = fsdp.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = tp.TP_DISTRIBUTED_TEST_MODEL_TYPES = (
        None)
    class Distributed(fsdp.FSDPTesterMixin, tp.TensorParallelTesterMixin, ep.ExpertParallelTesterMixin,
                      training.TrainingTesterMixin):
        model_tester, all_model_classes = None, (MoEForCausalLM,)
        def _get_tiny_config(self): # theirs changes the base's sizes and not the experts'
            config = self.model_tester.get_config()
            return type(config), config.to_diff_dict()
        def test_fsdp2_plan_vs_ddp_1_tied(self):
            self.skipTest("Upstream: with tied embeddings, transformers' own Llama and OLMoE fail it as well (5.24 "
                          "with torch 2.14 on CPU)")
    class DistributedNot(training.TrainingTesterMixin): model_tester, all_model_classes = None, (MoEForCausalLM,)
    return Distributed, DistributedNot

def _case(mixin, recipe):
    name = f'Test{mixin.__name__}_{recipe}'
    def set_up(self): self.model_tester = Sizes(recipe)
    return {name: type(name, (mixin, unittest.TestCase), dict(setUp=set_up, __module__=__name__))}

common, (distributed, training) = _common(), _distributed()
for r in recipes:
    globals().update(_case(common, r))
    globals().update(_case(distributed if r in ('smoe', 'moe_plus_plus') else training, r))
