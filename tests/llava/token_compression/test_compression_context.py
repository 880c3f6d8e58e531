import pytest
import torch

from llava.errors import ConfigError, UserError
from llava.token_compression import CompressionConfig, apply, compression, remove


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.token_compression = None


class Wrapper(torch.nn.Module):
    """Hands unknown attributes to the model inside, as many wrappers do; setting one would not reach it."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def test_it_sets_nests_and_restores():
    model, other = Model(), Model()
    outer = CompressionConfig(similarity_threshold=0.9)
    with compression(model, outer) as active:
        assert model.token_compression is active is outer
        with compression(model, retention_ratio=0.1):
            assert model.token_compression == CompressionConfig(retention_ratio=0.1)
        assert model.token_compression is outer
        assert other.token_compression is None
    assert model.token_compression is None


def test_it_restores_after_an_exception():
    model = Model()
    with pytest.raises(KeyError), compression(model, retention_ratio=0.1):
        raise KeyError
    assert model.token_compression is None


def test_apply_lasts_until_remove():
    model, other = Model(), Model()
    config = apply(model, retention_ratio=0.1)
    assert model.token_compression is config
    assert config == CompressionConfig(retention_ratio=0.1)
    with compression(model, retention_ratio=0.5):
        pass
    assert model.token_compression is config
    assert other.token_compression is None
    remove(model)
    remove(model)
    assert model.token_compression is None


def test_a_property_of_the_class_will_do():
    class WithProperty:
        state = "before"
        token_compression = property(lambda self: self.state, lambda self, value: setattr(self, "state", value))

    model = WithProperty()
    with compression(model, method="none") as config:
        assert model.state is config
    assert model.state == "before"


def test_mistakes_are_named():
    with (
        pytest.raises(UserError, match="Linear does not support token compression"),
        compression(torch.nn.Linear(1, 1), retention_ratio=0.1),
    ):
        pass
    with pytest.raises(UserError, match="Wrapper does not support"), compression(Wrapper(Model()), retention_ratio=0.1):
        pass
    with pytest.raises(ConfigError, match="did you mean 'retention_ratio'"), compression(Model(), retention_rato=0.1):
        pass
    with pytest.raises(ConfigError, match="exactly one"), compression(Model()):
        pass
    with (
        pytest.raises(ConfigError, match="not both"),
        compression(Model(), CompressionConfig(retention_ratio=0.1), seed=1),
    ):
        pass
