"""Models of users' own that break their contract: refused at the first example, in its terms."""

import pytest
import torch
from models.families import checkpoint
from models.tiny import stable_diffusion
from toy_ddpm import TINY_UNET

from dmin import DiffusionModel, Prediction
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Example, Examples
from dmin.diffusion.timesteps import Explicit
from dmin.models.autograd import by_autograd
from dmin.models.contract import check_precision
from dmin.models.families.ddpm import DDPM
from dmin.models.families.stable_diffusion import StableDiffusion
from dmin.runtime.errors import DminError
from dmin.sketches import FullGradient

IMAGES = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


class Own(DiffusionModel):
    """A linear denoiser; each test changes one thing of it."""

    timesteps = range(9, -1, -1)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Linear(16, 16)

    def predict(self, x0, noise, t, condition):
        output = self.network((x0 + noise).flatten(1))
        return Prediction(output, noise.flatten(1), torch.ones(len(x0)))


def collect(model, tmp_path, images=IMAGES, **settings):
    examples = Examples([Example(f"e{i}", x, label=i) for i, x in enumerate(images)])
    collector = GradientCollector(model, FullGradient(), Explicit([5]), **settings)
    return collector.collect(
        examples, tmp_path / "store", dtype="float32", trainer=predict_trainer(**QUIET)
    )


def returning(condition=None, x0=None, whole=None):
    """A model whose encode returns something else."""

    class Model(Own):
        def encode(self, batch):
            if whole is not None:
                return whole(batch["image"])
            image = 2 * batch["image"] - 1
            return (
                x0(image) if x0 else image,
                condition(image) if condition else {},
            )

    return Model()


ENCODINGS = {
    "nothing": ({"whole": lambda x: None}, r"Model\.encode returns None. It must return x0"),
    "x0 alone": ({"whole": lambda x: x}, r"returns a tensor \[6, 1, 4, 4\] of float32"),
    "three things": ({"whole": lambda x: (x, {}, {})}, "returns a tuple"),
    "x0 a dict": ({"x0": lambda x: {"video": x}}, "a dict as x0.*torch.cat"),
    "x0 a list": ({"x0": list}, "a list as x0"),
    "x0 of integers": ({"x0": lambda x: x.long()}, "of int64 as x0"),
    "x0 a vector": ({"x0": lambda x: x.flatten(1).sum(1)}, r"\[6\] of float32 as x0"),
    "x0 of one row": ({"x0": lambda x: x[:1]}, r"x0 of \[1, 1, 4, 4\] for 6 example"),
    "condition a list": ({"condition": lambda x: [1]}, "a list as the condition. It must be a d"),
    "condition None": ({"whole": lambda x: (x, None)}, "None as the condition"),
    "a list": ({"condition": lambda x: {"c": [1] * len(x)}}, "a list as the condition 'c'.*stack"),
    "an int": ({"condition": lambda x: {"c": 3}}, "a int as the condition 'c'"),
    "a None": ({"condition": lambda x: {"c": None}}, "None as the condition 'c'.*leave out None"),
    "no axis": (
        {"condition": lambda x: {"img_ids": torch.zeros(64, 3)}},
        r"'img_ids' of \[64, 3\] for 6 example.*name it 'shared\.img_ids'",
    ),
    "a scalar": ({"condition": lambda x: {"c": torch.tensor(1.0)}}, r"'c' of \[\] for 6"),
    "an axis by chance": (
        {"condition": lambda x: {"c": torch.zeros(6, 3)}},
        r"'c' of \[6, 3\] for 1 example",
    ),
    "padded to the longest": (
        {"condition": lambda x: {"c": torch.zeros(len(x), 3 * len(x))}},
        r"'c' is \[6, 18\] for 6 examples and \[1, 3\] for the first alone",
    ),
    "fails": (
        {"x0": lambda x: x.no_such_thing},
        r"encode fails at 6 example\(s\) from 'e0' on: AttributeError: .*test_own_models.py, line",
    ),
}


@pytest.mark.parametrize("what", ENCODINGS)
def test_encodings_are_checked(what, tmp_path):
    changes, message = ENCODINGS[what]
    with pytest.raises(DminError, match=f"(?s){message}"):
        collect(returning(**changes), tmp_path)
    store = tmp_path / "store"
    assert not list(store.glob("**/*.h5"))


def predicting(function):
    class Model(Own):
        def predict(self, x0, noise, t, condition):
            return function(*super().predict(x0, noise, t, condition)[:3])

    return Model()


PREDICTIONS = {
    "a tensor": (lambda p, y, w: p, r"Model\.predict returns a tensor .* a dmin\.models\.Predic"),
    "a tuple": (lambda p, y, w: (p, y, w), "returns a tuple"),
    "one row": (lambda p, y, w: Prediction(p.sum(0, True), y, w), "must have 6 rows"),
    "a number": (lambda p, y, w: Prediction(p.sum(), y, w), r"the prediction is a tensor \[\]"),
    "another shape": (
        lambda p, y, w: Prediction(p.unflatten(1, (4, 4)), y, w),
        r"target is a tensor \[6, 16\] .* prediction a tensor \[6, 4, 4\]",
    ),
    "no target": (lambda p, y, w: Prediction(p, None, w), "the target is None.*loss="),
    "one weight": (lambda p, y, w: Prediction(p, y, w.mean()), r"weight is a tensor \[\]"),
    "a float": (lambda p, y, w: Prediction(p, y, 1.0), "weight is a float, but must be one number"),
    "weights of pixels": (lambda p, y, w: Prediction(p, y, y), r"weight is a tensor \[6, 16\]"),
    "a mean as the loss": (
        lambda p, y, w: Prediction(p, y, w, loss=p.square().mean()),
        r"the loss is a tensor \[\].*do not take the mean over the batch",
    ),
    "fails": (
        lambda p, y, w: Prediction(p @ torch.zeros(3, 3), y, w),
        r"predict fails, given x0 \[6, 1, 4, 4\], noise .*RuntimeError.*test_own_models.py, line",
    ),
    "an unknown condition": (
        lambda p, y, w: {}["captions"],
        "predict fails, given .*KeyError: 'captions'",
    ),
}


@pytest.mark.parametrize("what", PREDICTIONS)
def test_predictions_are_checked(what, tmp_path):
    function, message = PREDICTIONS[what]
    with pytest.raises(DminError, match=f"(?s){message}"):
        collect(predicting(function), tmp_path)


def test_a_loss_that_is_nan_names_its_example(tmp_path):
    model = predicting(lambda p, y, w: Prediction(p * torch.nan, y, w))
    with pytest.raises(DminError, match="'e0'"):
        collect(model, tmp_path)


def test_the_timesteps_may_have_the_name_of_earlier_releases():
    with pytest.warns(DeprecationWarning, match="`ladder` of a model is now `timesteps`"):
        earlier = type("Earlier", (Own,), {"ladder": range(4, -1, -1)})()
    assert earlier.timesteps == range(4, -1, -1)
    with pytest.warns(DeprecationWarning):
        assert earlier.ladder == earlier.timesteps
        earlier.ladder = range(2, -1, -1)
    assert earlier.timesteps == range(2, -1, -1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("network", None, r"Own\.network is None"),
        ("network", torch.nn.ReLU(), r"Own\.network is a ReLU"),
        ("network", torch.nn.LazyLinear(4), r"no values yet: bias, weight.*called once"),
        ("timesteps", (), "needs a method predict.* and timesteps"),
    ],
)
def test_a_model_without_network_or_timesteps_is_refused(name, value, message):
    model = Own()
    setattr(model, name, value)
    with pytest.raises(DminError, match=message):
        GradientCollector(model)


def test_weights_that_were_not_loaded_are_refused(tmp_path):
    model = Own()
    model.network.to("meta")
    with pytest.raises(DminError, match=r"no values yet: .*\. Load its weights"):
        collect(model, tmp_path)


class Shared(Own):
    """Is told the same numbers for all examples, beside one of each example's own."""

    ids = torch.linspace(0, 1, 16)

    def encode(self, batch):
        own = torch.tensor(batch["label"])[:, None].float()
        return 2 * batch["image"] - 1, {"shared.ids": self.ids, "own": own}

    def predict(self, x0, noise, t, condition):
        assert condition["shared.ids"].shape == (16,)
        told = (x0 + noise).flatten(1) * condition["own"] + condition["shared.ids"]
        return Prediction(self.network(told), noise.flatten(1), torch.ones(len(x0)))


class Encoder(torch.nn.Linear):
    pass


@pytest.mark.parametrize("with_encoders", [False, True])
def test_a_condition_can_be_shared_by_all_examples(with_encoders, tmp_path):
    """With encoders, encodings are kept in files between."""

    class Model(Shared):
        encoders = {"text": torch.nn.Linear(1, 1)} if with_encoders else {}

    model = Model()
    store = collect(model, tmp_path, microbatch=4)
    collector = GradientCollector(model, FullGradient(), Explicit([5]))
    for i, image in enumerate(IMAGES):
        condition = {"shared.ids": Shared.ids, "own": torch.tensor([[float(i)]])}
        (batch,) = collector.inputs(2 * image[None] - 1, condition, ["x"]).all().split(1)
        true = by_autograd(model, ["weight", "bias"], batch, "loss")
        row = torch.cat([true["weight"].flatten(), true["bias"].flatten()])
        found = torch.from_numpy(store.features("loss", i, i + 1)).flatten()
        assert found.norm() == pytest.approx(1, abs=1e-4)
        order = torch.cat([true["bias"].flatten(), true["weight"].flatten()])
        apart = [(found - r / r.norm()).norm() for r in (row, order)]
        assert min(apart) <= 1e-5


def test_a_loss_of_ones_own_is_what_is_differentiated(tmp_path):
    def absolute(p, y, w):
        return Prediction(p, y, w, loss=(p - y).abs().mean(1))

    model = predicting(absolute)
    store = collect(model, tmp_path)
    collector = GradientCollector(model, FullGradient(), Explicit([5]))
    batch = collector.inputs(2 * IMAGES[:1] - 1, {}, ["x"]).all()
    loss = model.predict(*batch).loss.sum()
    true = torch.autograd.grad(loss, list(model.network.parameters()))
    length = torch.cat([g.flatten() for g in true]).norm()
    assert store.norms("loss")[0].item() == pytest.approx(length.item(), rel=1e-5)
    assert store.losses()[0].item() == pytest.approx(loss.item(), rel=1e-5)


def test_half_precision_is_refused_alike_in_hand_and_from_a_folder(tmp_path):
    with pytest.raises(DminError, match=r"are float16 \(such as .*network\.to\(torch\.bfloat16"):
        StableDiffusion(stable_diffusion().to(torch.float16))
    with pytest.raises(DminError, match="allowed are float32, bfloat16 and float64"):
        StableDiffusion.from_pretrained(checkpoint("stable_diffusion"), torch_dtype="float16")
    import diffusers

    network = diffusers.UNet2DModel(**TINY_UNET)
    with pytest.raises(DminError, match="are float16"):
        DDPM(network.half(), diffusers.DDPMScheduler())
    model = Own()
    model.network.half()
    with pytest.raises(DminError, match="2 parameters of the network are float16"):
        collect(model, tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_other_precisions_are_taken_in_hand_and_from_a_folder(dtype, tmp_path):
    path = checkpoint("stable_diffusion")
    loaded = StableDiffusion.from_pretrained(path, torch_dtype=dtype)
    assert loaded.network.dtype == getattr(torch, dtype)
    in_hand = StableDiffusion(loaded.pipeline)
    collector = GradientCollector(in_hand, timesteps=Explicit([5]))
    examples = Examples([Example(f"{i}", torch.rand(3, 16, 16), caption="cat") for i in range(2)])
    store = collector.collect(examples, tmp_path / "s", trainer=predict_trainer(**QUIET))
    assert (store.norms("loss") > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_ddpm_of_another_precision_is_computed_in_it(dtype, ddpm_path, tmp_path):
    examples = Examples([Example(f"{i}", torch.rand(1, 8, 8), label=i) for i in range(3)])
    model, found = DDPM.from_pretrained(ddpm_path), []
    for precision in (torch.float32, dtype):
        model.network.to(precision)
        collector = GradientCollector(model, timesteps=Explicit([5]))
        place = tmp_path / str(precision)
        store = collector.collect(examples, place, trainer=predict_trainer(**QUIET))
        found.append(store.features("loss"))
    limit = 0.1 if dtype == torch.bfloat16 else 1e-3
    assert abs(found[1] - found[0]).max() < limit * abs(found[0]).max()


def test_autocast_around_a_collection_is_refused(tmp_path):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(DminError, match="autocast is on"):
        collect(Own(), tmp_path)
    check_precision(Own().network)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_of_the_trainer_is_refused(precision, tmp_path):
    collector = GradientCollector(Own(), FullGradient(), Explicit([5]))
    trainer = predict_trainer(**QUIET, precision=precision)
    examples = Examples([Example(f"e{i}", x) for i, x in enumerate(IMAGES)])
    with pytest.raises(DminError, match=r"trainer\.precision=.*-mixed.*Set 32-true"):
        collector.collect(examples, tmp_path / "store", trainer=trainer)
