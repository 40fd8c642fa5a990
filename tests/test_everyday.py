"""Everyday ways to build and call models: configs that will not tell, image towers, parts called one by one."""

import copy
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import workbench
from support.tiny import family, make
from workbench import CaptureError
from workbench.hooks.configs import config_of, read
from workbench.hooks.finding import find_sites
from workbench.inputs import context_length


class TestConfigs:
    @pytest.mark.parametrize(
        "sizes",
        [
            {},
            {"global_head_dim": 16},
            {"global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
        ],
    )
    @torch.no_grad()
    def test_layers_of_several_sizes(self, sizes: dict[str, Any]) -> None:
        config = transformers.Gemma4TextConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, vocab_size=99, layer_types=["sliding_attention", "full_attention"], sliding_window=5,
            num_kv_shared_layers=0, hidden_size_per_layer_input=8, vocab_size_per_layer_input=99, pad_token_id=0,
            **sizes,
        )  # fmt: skip
        model = transformers.Gemma4ForCausalLM(config).eval()
        with workbench.attach(model) as wb:
            wb.verify(torch.randint(3, 99, (2, 12))).raise_if_failed()
            with wb.capture():
                model(torch.randint(3, 99, (2, 12)))
            found = [(site.n_heads, site.n_kv_heads, site.d_head) for site in wb.sites]
        kv = sizes.get("num_global_key_value_heads", 2)
        assert found == [(4, 2, 8), (4, kv, sizes.get("global_head_dim", 512))]
        if kv == 1:  # also before anything has run
            assert [site.n_kv_heads for site in find_sites(model)] == [2, 1]

    def test_a_config_that_raises(self) -> None:
        class Config:
            hidden_size = 24

            def __getattr__(self, name: str) -> int:
                raise RuntimeError(f"{name} differs from layer to layer")

        class Lazy:
            @property
            def num_heads(self) -> int:
                raise KeyError("not built yet")

        assert (read(Config(), "hidden_size"), read(Config(), "num_heads", 3), read(Lazy(), "num_heads")) == (
            24,
            3,
            None,
        )
        layers = SimpleNamespace(per_layer_config=[SimpleNamespace(heads=2), SimpleNamespace(heads=3)])
        module = nn.Module()
        module.config, module.layer_idx = layers, 1
        assert config_of(module).heads == 3
        model = nn.Sequential(Block())
        model.config = model[0].config = Config()
        with workbench.attach(model) as wb, wb.capture() as cap:
            model(torch.randn(1, 5, 24))
        assert cap["0"].shape == (1, 4, 5, 5)


class TestContext:
    def test_positions_of_an_image_limit_no_prompt(self) -> None:
        tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = transformers.GitConfig(
            vision_config=tower | {"image_size": 16, "patch_size": 8}, vocab_size=99, max_position_embeddings=64,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, **tower,
        )  # fmt: skip
        model = transformers.GitForCausalLM(config).eval()
        assert context_length(model) == 64
        ids, pixels = torch.randint(3, 99, (1, 12)), torch.randn(1, 3, 16, 16)
        with torch.no_grad(), workbench.attach(model) as wb:
            wb.verify(input_ids=ids, pixel_values=pixels).raise_if_failed()
            with pytest.raises(CaptureError, match="65 tokens, the model's context 64"):
                wb.verify(input_ids=torch.ones(1, 65, dtype=torch.long), pixel_values=pixels)

    @pytest.mark.parametrize(("name", "limited"), [("gpt2", True), ("bert", True), ("llama-gqa", False)])
    def test_tables_of_words(self, name: str, limited: bool) -> None:
        model = make(family(name))
        assert (context_length(model) is not None) == limited

    def test_towers_by_hand(self) -> None:
        """An image tower beside a text with rotary positions, and one beside a text with coordinates of its own."""

        def tower(**tables: int) -> nn.Module:
            return nn.ModuleDict({name: nn.Embedding(size, 4) for name, size in tables.items()})

        image = tower(position_embedding=5, kind_embedding=2)
        for text, stated in ((tower(words=99), None), (tower(words=99, position=40, x_position=9), 40)):
            model = nn.ModuleDict({"image": copy.deepcopy(image), "text": text})
            model.config = SimpleNamespace(max_position_embeddings=40, vocab_size=99)
            assert context_length(model) == stated


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.o = 4, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(24, 24)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(24, 5)

    @torch.no_grad()
    def forward_features(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return x

    def forward(self, x: Tensor) -> Any:
        return self.head(self.forward_features(x))

    def steps(self, x: Tensor, n: int) -> Tensor:
        for _ in range(n):
            for block in self.blocks:
                x = x + block(x)
        return x


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


class TestPartsCalledOneByOne:
    @pytest.mark.parametrize("call", ["forward_features", "forward"])
    def test_a_method_is_one_forward(self, net: Net, call: str) -> None:
        x = torch.randn(2, 7, 24)
        with workbench.attach(net) as wb:
            with wb.capture(z=True) as whole:
                net(x)
            with wb.capture(z=True) as cap:
                getattr(net, call)(x)
                getattr(net, call)(2 * x)
            with wb.capture(z=True) as first:
                getattr(net, call)(x)
        assert (len(cap.calls), len(first.calls)) == (2, 1)
        assert [site.name for site in first.sites] == [site.name for site in whole.sites]
        for one, same in zip(first, whole, strict=True):
            assert torch.equal(one.entropy, same.entropy)
            torch.testing.assert_close(one.result(), same.result())

    def test_parts_that_run_again_begin_a_forward(self, net: Net) -> None:
        with workbench.attach(net) as wb, wb.capture() as cap:
            net.steps(torch.randn(1, 5, 24), 3)
        assert [len(forward.sites) for forward in cap.calls] == [3, 3, 3]

    def test_parts_that_a_user_calls_are_forwards_of_their_own(self, net: Net) -> None:
        x = torch.randn(1, 5, 24)
        with workbench.attach(net) as wb, wb.capture() as cap:
            for block in net.blocks:
                block(x)
        assert len(cap.calls) == 3

    def test_in_several_threads(self, net: Net) -> None:
        x = torch.randn(2, 7, 24)
        with workbench.attach(net) as wb, wb.capture(z=True) as cap:
            threads = [threading.Thread(target=net.forward_features, args=(x,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert [len(forward.sites) for forward in cap.calls] == [3, 3, 3]
        assert all(cap.calls[i]["blocks.2"].result().shape == (2, 7, 4, 24) for i in range(3))

    def test_edits_reach_them(self, net: Net) -> None:
        x = torch.randn(1, 5, 24)
        with workbench.attach(net) as wb, wb.ablate((1, 2)):
            edited = net.forward_features(x)
        assert not torch.allclose(edited, net.forward_features(x))


class Nothing(Net):
    def forward(self, x: Tensor) -> None:
        self.last = self.forward_features(x)


class Boxed(Net):
    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(result=SimpleNamespace(h=self.forward_features(x)), name="out")


class TestVerify:
    def test_outputs_that_are_nothing_or_an_object(self) -> None:
        x = torch.randn(2, 7, 24)
        with workbench.attach(Nothing().eval()) as wb:
            nothing = wb.verify(x).raise_if_failed()
        assert not nothing.compared
        assert "without tensors to compare" in repr(nothing)
        with workbench.attach(Boxed().eval()) as wb:
            boxed = wb.verify(x).raise_if_failed()
        assert boxed.compared
        assert boxed.table.editable.all()

    def test_an_object_that_differs_is_seen(self) -> None:
        class Random(Boxed):
            runs = 0

            def forward(self, x: Tensor) -> Any:
                Random.runs += 1
                return super().forward(x + Random.runs)

        with workbench.attach(Random().eval()) as wb:
            assert not wb.verify(torch.randn(2, 7, 24)).identical

    @pytest.mark.parametrize("static", [False, True])
    @torch.no_grad()
    def test_a_cache_stays_the_callers(self, static: bool) -> None:
        one = family("llama-gqa")
        model, ids = make(one), one.inputs()["input_ids"]
        cache: Any = (
            transformers.StaticCache(config=model.config, max_cache_len=32)
            if static
            else transformers.DynamicCache(config=model.config)
        )
        model(ids, past_key_values=cache)
        before = copy.deepcopy(cache)
        with workbench.attach(model) as wb:
            wb.verify(input_ids=ids[:, :1], past_key_values=cache).raise_if_failed()
        assert int(cache.get_seq_length()) == int(before.get_seq_length()) == ids.shape[1]
        for a, b in zip(cache.layers, before.layers, strict=True):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)

    def test_a_cache_with_a_graph(self) -> None:
        one = family("llama-gqa")
        model, ids = make(one), one.inputs()["input_ids"]
        cache = transformers.DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        with workbench.attach(model) as wb:
            wb.verify(input_ids=ids[:, :1], past_key_values=cache).raise_if_failed()
        assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
class TestTransforms:
    @pytest.mark.parametrize("transform", ["vmap", "grad", "jacrev"])
    def test_a_capture_says_that_it_cannot(self, net: Net, transform: str) -> None:
        x, block = torch.randn(2, 7, 24), net.blocks[0]
        runs = {
            "vmap": lambda: torch.func.vmap(lambda one: block(one[None]))(x),
            "grad": lambda: torch.func.grad(lambda one: block(one).sum())(x),
            "jacrev": lambda: torch.func.jacrev(lambda one: block(one).sum(1))(x),
        }
        bare = runs[transform]()
        with workbench.attach(net) as wb:
            with pytest.raises(CaptureError, match=r"torch\.func"), wb.capture():
                runs[transform]()
            with wb.capture(sites="blocks.0") as cap:
                block(x)
        assert len(cap.calls) == 1
        assert torch.equal(runs[transform](), bare)


class OnlyInTheWhole(Block):
    """Runs only while the whole model does, as a module does whose weights are brought in for it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.inside:
            raise RuntimeError("the weights are not here")
        return super().forward(x)


class Bringing(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        self[0].inside = True
        try:
            return super().forward(x)
        finally:
            self[0].inside = False


def test_modules_that_cannot_run_alone_are_verified_and_said_to_be_unlooked_at() -> None:
    with workbench.attach(Bringing(OnlyInTheWhole()).eval()) as wb:
        verification = wb.verify(torch.randn(2, 7, 24)).raise_if_failed()
    assert not verification.looked
    assert "cannot be run again by itself" in verification.unread[0].reason


def test_a_verification_without_sites_has_its_columns() -> None:
    with workbench.attach(nn.Sequential(nn.Linear(3, 3)), check=False) as wb:
        table = wb.verify(torch.randn(2, 3)).table
    assert list(table[~table.ok].site) == []
