"""Records for tests: a VM, an image, a kernel, with what a test cares about."""

from __future__ import annotations

from typing import Any

from banger.base.model import (
    Image,
    InitMode,
    Kernel,
    NetworkMode,
    Snapshot,
    Template,
    Vm,
    VmRuntime,
    VmSpec,
    VmState,
    now,
)


def a_vm(
    name: str,
    *,
    vm_id: str | None = None,
    state: VmState = VmState.STOPPED,
    image_id: str = "image",
    ephemeral: bool = False,
    **runtime: Any,
) -> Vm:
    return Vm(
        id=vm_id or f"id-{name}",
        name=name,
        image_id=image_id,
        image_name="debian-bookworm",
        kernel_id="kernel",
        spec=VmSpec(
            vcpu_count=2,
            memory_mib=512,
            disk_size_mib=1024,
            system_overlay_size_mib=2048,
            ephemeral=ephemeral,
        ),
        runtime=VmRuntime(state=state, **runtime),
        created_at=now(),
        updated_at=now(),
    )


def a_template(template_id: str = "id-template", **fields: Any) -> Template:
    values: dict[str, Any] = {
        "id": template_id,
        "key": f"key of {template_id}",
        "image_id": "id-debian",
        "image_name": "debian",
        "kernel_id": "kernel",
        "vcpu_count": 2,
        "memory_mib": 512,
        "disk_size_mib": 1024,
        "init": InitMode.MINIMAL,
        "network": NetworkMode.USER,
        "directory": "",
        "size_bytes": 1 << 20,
        "created_at": now(),
        "used_at": now(),
    }
    return Template(**values | fields)


def a_snapshot(name: str = "snap", **fields: Any) -> Snapshot:
    values: dict[str, Any] = {
        "id": f"id-{name}",
        "name": name,
        "vm_id": "id-box",
        "vm_name": "box",
        "image_id": "id-debian",
        "image_name": "debian",
        "kernel_id": "kernel",
        "spec": a_vm("box").spec,
        "shape": "shape",
        "directory": "",
        "system_disk": "system.qcow2",
        "work_disk": "work.qcow2",
        "size_bytes": 1 << 20,
        "paused_ms": 10.5,
        "created_at": now(),
    }
    return Snapshot(**values | fields)


def an_image(name: str, **fields: Any) -> Image:
    values: dict[str, Any] = {
        "id": f"id-{name}",
        "name": name,
        "kernel_id": "kernel",
        "artifact_dir": "",
        "rootfs_path": "",
        "work_seed_path": "",
        "init": InitMode.MINIMAL,
        "size_bytes": 1,
        "created_at": now(),
    }
    return Image(**values | fields)


def a_kernel(name: str = "debian", **fields: Any) -> Kernel:
    values: dict[str, Any] = {
        "id": "kernel",
        "name": name,
        "version": "6.1.0-1-cloud-amd64",
        "architecture": "x86_64",
        "artifact_dir": "",
        "vmlinux_path": "",
        "boot_modules_path": "",
        "modules_path": "",
        "config_path": "",
        "size_bytes": 1,
        "created_at": now(),
    }
    return Kernel(**values | fields)
