#!/bin/sh
# An aarch64 Python for qemu-user, with what reading .jsm files needs: FOLDER/root and FOLDER/site.
# Of Debian or Ubuntu, by apt and pip only: sh tests/arm/setup.sh FOLDER PYTHON (of the environment, for pip)
set -eu

folder=$1
pip="$2 -m pip --disable-pip-version-check"
root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

command -v qemu-aarch64 >/dev/null || root apt-get install --yes --no-install-recommends qemu-user
if ! dpkg --print-foreign-architectures | grep -qx arm64; then
    root dpkg --add-architecture arm64
fi
root apt-get update --quiet=2

version=$(apt-cache depends python3-minimal:arm64 | grep -o 'python3\.[0-9]*' | head -n 1)
test -n "$version" || { echo "apt knows no python3-minimal:arm64; on Ubuntu add ports.ubuntu.com for arm64" >&2; exit 1; }
mkdir -p "$folder/debs" "$folder/root" "$folder/site"
# The interpreter, and the libraries that its modules and the wheels link to; names differ between releases.
wanted="$version-minimal lib$version-minimal lib$version-stdlib libc6 libgcc-s1 libstdc++6 zlib1g libbz2-1.0 liblzma5
    libexpat1 libssl3 libssl3t64 libffi8 libuuid1 libsqlite3-0"
for package in $wanted; do
    if apt-cache show "$package:arm64" >/dev/null 2>&1; then
        (cd "$folder/debs" && apt-get download --quiet=2 "$package:arm64")
    fi
done
for package in "$folder"/debs/*.deb; do dpkg --extract "$package" "$folder/root"; done

$pip download --quiet --only-binary :all: --python-version "${version#python}" \
    --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 \
    --dest "$folder/wheels" --constraint "constraints/${version#python}.txt" numpy onnx rich scipy pytest
for wheel in "$folder"/wheels/*.whl; do "$2" -m zipfile --extract "$wheel" "$folder/site"; done
mkdir -p "$folder/site/jointsparse"
for room in frontends passes schedules; do ln -sfn "$(pwd)/$room" "$folder/site/jointsparse/$room"; done
ln -sfn "$(cd "$folder" && find root/usr/bin -name "$version")" "$folder/python"
touch "$folder/ready"
