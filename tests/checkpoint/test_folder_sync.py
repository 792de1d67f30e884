import errno
import os

import pytest

from megatron_nepa.checkpoint.saving.checkpoints_folder import sync_folder


@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.parametrize(
    ("number", "is_fatal"),
    [
        (errno.EINVAL, False),
        (errno.EBADF, False),
        (errno.ENOTSUP, False),
        (errno.EACCES, False),
        (errno.EIO, True),
        (errno.ENOSPC, True),
    ],
)
def test_a_folder_that_cannot_be_synced_fails_no_save_but_a_broken_disk_does(
    tmp_path, monkeypatch, call, number, is_fatal
):
    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        if is_fatal:
            with pytest.raises(OSError, match=os.strerror(number)):
                sync_folder(tmp_path)
        else:
            sync_folder(tmp_path)
