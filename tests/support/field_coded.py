"""Field-coded H.264, as camcorders record it: no encoder at hand writes it, so the bits are written here.

Macroblocks are stored as raw samples (I_PCM), so that there is nothing to predict or transform.
"""

from fractions import Fraction

import av
import numpy as np

from tests.support.videos import numbered

WIDTH, HEIGHT = 64, 64
FIRST, FIELD = 133, 1800  # time stamps in ticks of 90 kHz; 25 frames per second


def _ue(value):
    """Exp-Golomb code (H.264, 9.1) as a string of bits."""
    bits = f"{value + 1:b}"
    return "0" * (len(bits) - 1) + bits


def _nal(header, bits):
    bits += "1"
    bits += "0" * (-len(bits) % 8)
    return b"\0\0\0\1" + bytes([header]) + int(bits, 2).to_bytes(len(bits) // 8, "big")


def _parameter_sets():
    """Main profile, level 3, frames of 64x64 pixels that may be field-coded (H.264, 7.3.2.1 and 7.3.2.2)."""
    fields = [_ue(0), _ue(0), _ue(2), _ue(1), "0", _ue(WIDTH // 16 - 1), _ue(HEIGHT // 32 - 1)]
    sequence = f"{77:08b}" + "00000000" + f"{30:08b}" + "".join(fields) + "0" + "0" + "1" + "0" + "0"
    picture = _ue(0) + _ue(0) + "0" + "0" + _ue(0) + _ue(0) + _ue(0) + "0" + "00" + _ue(0) * 3 + "100"
    return _nal(0x67, sequence) + _nal(0x68, picture)


def _slice(luma, idr_id, field, frame_num):
    """An I slice with all macroblocks of a picture, (height, 64) uint8. field: None, 0 (top) or 1 (bottom)."""
    is_idr = field != 1
    bits = _ue(0) + _ue(7) + _ue(0) + f"{frame_num:04b}"
    bits += "0" if field is None else f"1{field}"
    if is_idr:
        bits += _ue(idr_id)
    bits += "00" if is_idr else "0"  # decoded reference picture marking
    bits += "1"  # slice_qp_delta 0
    bits += _ue(1)  # no deblocking
    content, first = b"", True
    for y in range(0, luma.shape[0], 16):
        for x in range(0, WIDTH, 16):
            head = (bits if first else "") + _ue(25)
            head += "0" * (-len(head) % 8)
            content += int("1" + head, 2).to_bytes(len(head) // 8 + 1, "big")[1:]
            content += luma[y : y + 16, x : x + 16].tobytes() + bytes([128]) * 128
            first = False
    return b"\0\0\0\1" + (b"\x65" if is_idr else b"\x61") + content + b"\x80"


def write_field_coded(path, is_field_coded):
    """An MPEG-TS file of numbered frames; is_field_coded: (frames,) bool, which of them have a packet per field."""
    with av.open(str(path), "w", format="mpegts") as file:
        stream = file.add_mux_stream("h264", rate=25, width=WIDTH, height=HEIGHT)
        for k, coded in enumerate(is_field_coded):
            luma = np.maximum(numbered(k, WIDTH, HEIGHT), 16)
            head = b"\0\0\0\1\x09\xf0" + _parameter_sets()
            slices = [_slice(luma, k % 2, None, 0)]
            if coded:
                slices = [_slice(luma[0::2], k % 2, 0, 0), _slice(luma[1::2], k % 2, 1, 0)]
            for field, content in enumerate(slices):
                packet = av.Packet((head if field == 0 else b"\0\0\0\1\x09\xf0") + content)
                packet.stream = stream
                packet.time_base = Fraction(1, 90000)
                packet.pts = packet.dts = FIRST + 2 * FIELD * k + FIELD * field
                packet.is_keyframe = field == 0
                file.mux(packet)
    return path
