"""The contribution of each position of an image to a readout."""

from torch import Tensor

from dmin.models.base import Prediction
from dmin.runtime.errors import DminError


def by_place(readout: str, prediction: Prediction) -> Tensor:
    """Return the terms of a readout at each position p, ``[batch, h, w]``, summed over channels.

    ``w_b m_bp (prediction_bp − target_bp)² / P`` for the loss, ``m_bp prediction_bp² / P`` for
    ``mean_squared_output``, ``m_bp prediction_bp / P`` for ``mean_output``; m is the mask or 1, P
    the number of values of an example. The bound of a learned variance is left out.

    Args:
        readout: a name in ``READOUTS``.
        prediction: the model's prediction for a batch.

    Raises:
        DminError: the prediction is not an image, or the model has its own loss.
    """
    output, size = prediction.prediction, prediction.prediction[0].numel()
    if output.ndim < 4 or (readout == "loss" and prediction.loss is not None):
        what = "a loss of its own" if output.ndim >= 4 else f"predictions of {list(output.shape)}"
        raise DminError(
            f"retrieve.places: the model has {what}, which is not a sum over positions of an "
            f"image. Set retrieve.places=0."
        )
    values = output if readout == "mean_output" else output.square()
    if readout == "loss":
        weight = prediction.weight.view(-1, *[1] * (output.ndim - 1))
        values = weight * (output - prediction.target).square()
    if prediction.mask is not None:
        values = prediction.mask * values
    found = values.flatten(1, -3).sum(1) / size
    if prediction.dropped is None:
        return found
    share = prediction.dropped.share
    return (1 - share) * found + share * by_place(readout, prediction.dropped.prediction)
