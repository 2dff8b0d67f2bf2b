"""A cable that takes its time: `python delayed.py NAME OTHER SECONDS` makes two network devices, root's, in the network
that it runs in; what goes into one comes out of the other so much later. Its output is a line once they are there.
"""

from __future__ import annotations

import fcntl
import os
import selectors
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
LONGEST_FRAME = 65536


def device(name: str) -> int:
    opened = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(opened, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return opened


def main(name: str, other: str, seconds: str) -> None:
    delay_s = float(seconds)
    ends = device(name), device(other)
    print("ready", flush=True)
    under_way: deque[tuple[float, int, bytes]] = deque()  # when it is due, the end where it comes out, a frame
    with selectors.DefaultSelector() as selector:
        for end, far in (ends, ends[::-1]):
            selector.register(end, selectors.EVENT_READ, far)
        while True:
            wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
            for key, _ in selector.select(wait_s):
                under_way.append((time.monotonic() + delay_s, key.data, os.read(key.fd, LONGEST_FRAME)))
            while under_way and under_way[0][0] <= time.monotonic():
                _, end, frame = under_way.popleft()
                try:
                    os.write(end, frame)
                except OSError:
                    continue  # the device is down: the frame is lost


if __name__ == "__main__":
    main(*sys.argv[1:])
