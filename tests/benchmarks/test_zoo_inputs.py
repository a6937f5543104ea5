"""Inputs are found by signatures, sizes of the configuration, and what errors ask for."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import zoo_inputs, zoo_shrink


class Model(nn.Module):
    """What its ``check`` raises decides which inputs it accepts."""

    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(**config)


class Boxes(Model):
    def forward(self, input_ids, bbox=None, image=None):
        if bbox is None:
            raise ValueError("You have to specify bbox")
        if bbox.is_floating_point():
            raise TypeError("bbox has integers")
        assert bbox.shape[:2] == input_ids.shape


class Grid(Model):
    main_input_name = "pixel_values"

    def forward(self, hidden_states, grid_thw):
        patches = int(grid_thw.prod(-1).sum())
        nn.functional.linear(hidden_states, torch.ones(64, 3 * 2 * 7 * 7))
        assert hidden_states.shape[0] == patches


class TextAndImage(Model):
    def forward(self, input_ids, pixel_values):
        assert input_ids.shape[0] == pixel_values.shape[0]
        assert pixel_values.shape[-2:] == (96, 64)


class Unknown(Model):
    def forward(self, inference_session):
        raise AssertionError("never called")


class Nothing(Model):
    def forward(self, input_ids=None, inputs_embeds=None):
        raise ValueError("You must specify something else")


def test_errors_name_what_is_missing():
    inputs = zoo_inputs.accepted(Boxes()).inputs
    assert inputs.keys() == {"input_ids", "bbox"}


def test_patches_follow_the_configuration():
    model = Grid(vision_config=SimpleNamespace(to_dict=None, patch_size=7, temporal_patch_size=2, num_channels=3))
    inputs = zoo_inputs.accepted(model).inputs
    assert inputs["hidden_states"].shape == (zoo_inputs.GRID**2, 3 * 2 * 7 * 7)


def test_text_beside_an_image_has_its_batch():
    inputs = zoo_inputs.accepted(TextAndImage(image_size=(96, 64))).inputs
    assert inputs["input_ids"].shape == (1, zoo_inputs.LENGTH)


def test_text_alone_has_a_batch():
    class Text(Model):
        def forward(self, input_ids):
            pass

    assert zoo_inputs.accepted(Text()).inputs["input_ids"].shape == (zoo_inputs.BATCH, zoo_inputs.LENGTH)


def test_what_fits_no_input_says_why():
    with pytest.raises(zoo_inputs.NoInputsError, match="no input is known for its inference_session"):
        zoo_inputs.accepted(Unknown())
    with pytest.raises(zoo_inputs.NoInputsError, match="first: ValueError: You must specify something else"):
        zoo_inputs.accepted(Nothing())


def test_shrink_fills_what_is_open_only_when_asked():
    defaults = {"model_type": "any", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": None}
    assert zoo_shrink.shrink(defaults).get("num_key_value_heads") is None
    assert zoo_shrink.shrink(defaults, fill=True)["num_key_value_heads"] == 2


def test_shrink_keeps_stages_and_their_outputs():
    pyramid = {"model_type": "any", "depths": [3, 4, 6, 3], "num_layers": 4, "out_indices": [2, 3, 4], "embed_dim": 96}
    small = zoo_shrink.shrink(pyramid)
    assert (small["depths"], small["num_layers"], small["out_indices"]) == ([1, 1, 1, 1], 4, [2, 3, 4])
    layered = {"model_type": "any", "num_hidden_layers": 12, "out_indices": [3, 6, 9, 12]}
    small = zoo_shrink.shrink(layered)
    assert (small["num_hidden_layers"], small["out_indices"]) == (4, [1, 2, 3, 4])


def test_special_replaces_what_is_no_configuration():
    defaults = {"text_config": {"model_type": "any", "rope_parameters": {"rope_theta": 1.0, "rope_type": "default"}}}
    sections = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    small = zoo_shrink.shrink(defaults, {"text_config": {"rope_parameters": sections}})
    assert small["text_config"]["rope_parameters"] == sections
