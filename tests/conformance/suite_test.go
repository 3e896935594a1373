// SPDX-License-Identifier: Apache-2.0

// Package conformance runs containerd's own snapshotter test suite against a daemon, over the gRPC
// API and through the proxy that containerd itself uses for plugins.
//
// The daemon is started anew for each case, by the command in LAZYSNAP_DAEMON, to which
// "--root R --address S" is appended. It is ready when its socket accepts a connection.
package conformance

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

const (
	startLimit   = 60 * time.Second
	stopLimit    = 20 * time.Second
	maxSocketLen = 107
)

// The name is part of the contract: containerd exempts "overlayfs" from the part of the Rename case
// that no overlay without redirect_dir can pass.
func TestSnapshotter(t *testing.T) {
	command := strings.Fields(os.Getenv("LAZYSNAP_DAEMON"))
	if len(command) == 0 {
		t.Fatal("LAZYSNAP_DAEMON is not set")
	}
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		return start(t, command, root)
	})
}

func start(t *testing.T, command []string, root string) (snapshots.Snapshotter, func() error, error) {
	socket := filepath.Join(filepath.Dir(root), "s.sock")
	if len(socket) > maxSocketLen {
		return nil, nil, fmt.Errorf("socket path is too long: %s", socket)
	}
	logFile, err := os.Create(filepath.Join(filepath.Dir(root), "daemon.log"))
	if err != nil {
		return nil, nil, err
	}
	args := append(append([]string{}, command[1:]...), "--root", root, "--address", socket)
	daemon := exec.Command(command[0], args...)
	daemon.Stdout, daemon.Stderr = logFile, logFile
	// The daemon inherits the umask 0 that the suite sets, so modes must not depend on it.
	if err := daemon.Start(); err != nil {
		return nil, nil, err
	}
	exited := make(chan error, 1)
	go func() { exited <- daemon.Wait() }()
	output := func() string {
		text, _ := os.ReadFile(logFile.Name())
		return string(text)
	}

	for deadline := time.Now().Add(startLimit); ; {
		if connection, err := net.Dial("unix", socket); err == nil {
			connection.Close()
			break
		}
		select {
		case err := <-exited:
			return nil, nil, fmt.Errorf("daemon exited: %v\n%s", err, output())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			daemon.Process.Kill()
			return nil, nil, fmt.Errorf("daemon does not listen on %s\n%s", socket, output())
		}
	}

	connection, err := grpc.Dial("unix://"+socket, grpc.WithInsecure())
	if err != nil {
		daemon.Process.Kill()
		return nil, nil, err
	}
	stop := func() error {
		connection.Close()
		daemon.Process.Signal(syscall.SIGTERM)
		select {
		case err := <-exited:
			if err != nil {
				return fmt.Errorf("daemon exited: %v\n%s", err, output())
			}
		case <-time.After(stopLimit):
			daemon.Process.Kill()
			return fmt.Errorf("daemon does not stop\n%s", output())
		}
		if t.Failed() {
			t.Logf("daemon log:\n%s", output())
		}
		return nil
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "lazysnap"), stop, nil
}
