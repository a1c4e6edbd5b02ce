"""The details of a tensor to the wire."""

from secateur_proto import report_pb2 as pb
from secateur_server.report.details import TensorDetails
from secateur_server.report.histogram import Histogram
from secateur_server.report.images import Image


def encode_details(details: TensorDetails) -> pb.TensorDetails:
    """Makes the message of a tensor's details."""
    return pb.TensorDetails(
        histogram=_histogram(details.histogram),
        groups=[pb.GroupCounts(m=m, groups=counts) for m, counts in details.groups.items()],
        images=map(_image, details.images),
        zero_slices=[
            pb.ZeroSlices(dim=dim, bits=bits) for dim, bits in details.zero_slices.items()
        ],
    )


def _histogram(histogram: Histogram) -> pb.MagnitudeHistogram:
    kept, pruned = histogram.counts[:, 1:-1].tolist()
    return pb.MagnitudeHistogram(
        largest=histogram.largest,
        kept=kept,
        pruned=pruned if histogram.pruned else (),
        zeros=histogram.zeros,
        non_finite=histogram.non_finite,
    )


def _image(image: Image) -> pb.PatternImage:
    message = pb.PatternImage(
        rows=image.rows, columns=image.columns, height=image.height, width=image.width
    )
    if image.are_bits:
        message.bits = image.pixels
    else:
        message.densities = image.pixels
    return message
