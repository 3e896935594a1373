// SPDX-License-Identifier: Apache-2.0

// The snapshotter of Debian's golang-github-containerd-stargz-snapshotter-dev as a daemon, to be measured
// beside lazysnap: Debian builds ctr-remote from that source, and no containerd-stargz-grpc. It does what
// upstream's command does with the configuration below, but knows no credentials and no CRI.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/contrib/snapshotservice"
	"github.com/containerd/containerd/reference"
	"github.com/containerd/containerd/remotes/docker"
	"github.com/containerd/stargz-snapshotter/fs"
	"github.com/containerd/stargz-snapshotter/fs/config"
	"github.com/containerd/stargz-snapshotter/fs/source"
	"github.com/containerd/stargz-snapshotter/metadata/memory"
	"github.com/containerd/stargz-snapshotter/snapshot"
	"github.com/hashicorp/go-retryablehttp"
	"google.golang.org/grpc"
)

// Upstream's default (service/resolver/registry.go).
const requestTimeout = 30 * time.Second

// The defaults of upstream's configuration file, but for one: containers wait only a second, and not ten,
// for what is prefetched of a layer. On a slow network they are faster then, and nowhere slower. No other
// key of the file made the start of an optimised image faster.
var configuration = config.Config{
	PrefetchTimeoutSec:   1,
	DirectoryCacheConfig: config.DirectoryCacheConfig{Direct: true},
}

func serve(address, root string) error {
	retrying := retryablehttp.NewClient()
	retrying.Logger = nil
	client := retrying.StandardClient()
	client.Timeout = requestTimeout
	registries := docker.ConfigureDefaultRegistries(
		docker.WithClient(client), docker.WithPlainHTTP(docker.MatchLocalhost))
	hosts := func(image reference.Spec) ([]docker.RegistryHost, error) {
		return registries(image.Hostname())
	}
	filesystem, err := fs.NewFilesystem(filepath.Join(root, "stargz"), configuration,
		fs.WithGetSources(source.FromDefaultLabels(hosts)),
		fs.WithMetadataStore(memory.NewReader))
	if err != nil {
		return err
	}
	snapshotter, err := snapshot.NewSnapshotter(context.Background(),
		filepath.Join(root, "snapshotter"), filesystem, snapshot.AsynchronousRemove)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	api.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	listener, err := net.Listen("unix", address)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-signals
		server.Stop()
	}()
	if err := server.Serve(listener); err != nil {
		return err
	}
	return snapshotter.Close() // which unmounts
}

func main() {
	address := flag.String("address", "", "socket to listen at")
	root := flag.String("root", "", "directory for all state")
	flag.Parse()
	if *address == "" || *root == "" {
		flag.Usage()
		os.Exit(2)
	}
	if err := serve(*address, *root); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
